"""How long devices wait for data: rounds from a corpus on disk against the same from memory.

    python -m experiments.benchmarks.pipeline [--config=FILE.py] [--config.field=value ...]
        [--rounds=4] [--repeats=3] [--plot=FILE.png] [--json]

Consecutive rounds of a configuration (default: the quickstart's) are run several times from the
same state, in turns: with chunks that a thread reads, pads and transfers as always ("disk"), and
with chunks that were read and padded before ("memory"), which are only transferred. Every shape is
compiled before. The first round of each run, which nothing can be read ahead of, does not count.

* disk_seconds, memory_seconds: of a round, the median of its repeats, in the mean of the rounds;
* waiting: the share of disk_seconds in which the next chunk was not there;
* idle: the share of disk_seconds that memory_seconds does not need;
* reading_seconds: of a round, what reading and padding take alone.
"""

import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from absl import flags

from experiments.benchmarks import plots
from fedasr.cli import common
from fedasr.errors import UserError


class _Stored:
    """Stands for a `fedasr.data.batching.ClientBatcher`, with the chunks of a few rounds."""

    def __init__(self, chunks: dict[int, list[Any]]) -> None:
        self._chunks = chunks

    def chunks(self, users: Iterable[int], round: int, seed: int | None = None) -> Iterator[Any]:
        """What was read for that round."""
        del users, seed
        return iter(self._chunks[round])


def measure(simulation: Any, state: Any, rounds: int, repeats: int) -> dict[str, float]:
    """The figures above. `simulation` is left with what it had."""
    batcher, first = simulation.batcher, int(state.round)
    draws = simulation.draws(state)
    reading, chunks = [], {}
    for number in range(first, first + rounds + 1):
        users = draws.sampler.cohort(number)
        began = time.perf_counter()
        chunks[number] = list(batcher.chunks(users, number, draws.order))
        reading.append(time.perf_counter() - began)
    list(simulation.run(state, rounds + 1))  # compiles
    found: dict[str, list[list[Any]]] = {"disk": [], "memory": []}
    try:
        for _ in range(repeats):
            for name, source in (("disk", batcher), ("memory", _Stored(chunks))):
                simulation.batcher = source
                done = [metrics for _, metrics in simulation.run(state, rounds + 1)]
                found[name].append(done[1:])
    finally:
        simulation.batcher = batcher
    disk, memory = (
        sum(statistics.median(same.seconds for same in runs) for runs in zip(*every, strict=True))
        for every in found.values()
    )
    read = [metrics for done in found["disk"] for metrics in done]
    return {
        "disk_seconds": disk / rounds,
        "memory_seconds": memory / rounds,
        "waiting": sum(m.waiting for m in read) / sum(m.seconds for m in read),
        "idle": max(0.0, 1 - memory / disk),
        "reading_seconds": statistics.fmean(reading),
    }


def run() -> None:
    """Measures and prints."""
    common.configure_devices()
    import jax

    from fedasr.training.builders import corpora, models, simulations
    from fedasr.training.config import Config, resolve

    config = resolve(_CONFIG.value.to_dict())
    if config["data"]["resident"]:
        raise UserError("data.resident: there is nothing to wait for")
    typed = Config.of(config)
    directory = corpora.data_directory(typed)
    data = corpora.Data(directory, typed, lambda line: print(line, file=sys.stderr))
    recogniser = models.build_recogniser(typed)
    simulation = simulations.make_simulation(typed, data, recogniser.loss, jax.devices())
    state = simulation.init(recogniser.init(jax.random.key(config["seed"])))
    found = measure(simulation, state, flags.FLAGS.rounds, flags.FLAGS.repeats)
    if flags.FLAGS.plot:
        draw(found, flags.FLAGS.plot)
    devices = jax.local_devices()
    common.show(found | {"device": f"{len(devices)} x {devices[0].device_kind}"})


def draw(found: dict[str, float], path: str) -> None:
    """Seconds of a round from disk, from memory, and of reading alone."""
    names = {"from disk": "disk", "from memory": "memory", "reading and padding": "reading"}
    figure, (axes,) = plots.panels(1, 6, 2.2)
    rows = {name: {"": found[f"{key}_seconds"]} for name, key in names.items()}
    plots.bars(axes, rows, f"seconds of a round ({100 * found['idle']:.1f}% idle)")
    plots.save(figure, path)


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of the same names.
    flags.DEFINE_integer("rounds", 4, "Different rounds.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Of each, from disk and from memory.", lower_bound=1)
    plots.define_flag()


if __name__ == "__main__":
    _define_flags()
    _CONFIG = common.define_config("quickstart")
    common.main(run)
