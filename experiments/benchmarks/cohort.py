"""How close a whole federated round comes to the compute it must do.

    python -m experiments.benchmarks.cohort [--plot=FILE.png] [--json]

The workload: 32 clients x 4 steps x 2 utterances x 200 frames through a CTC Transformer of 1.1M
parameters, per-layer clipping and server LAMB included. In one process, in turns:

* bound: the same batch steps in one jitted central loop (no clients, no clipping, no server);
* python_loop: one jitted client step, called step by step and client by client;
* chunk: `Simulation` rounds, by the number of clients vmapped together on each device;
* ragged, ragged_bound: clients with 1 to 16 batches each, and a central loop over as many steps;
* peak_rss_mb: the process's peak memory over a round of 32 and of 256 clients, data streamed.

All figures but the memory are client steps per second, the median of the rounds timed.
"""

import dataclasses
import statistics
import time

from absl import flags

from experiments.benchmarks import plots
from experiments.benchmarks.workload import RandomSpeech, peak_rss_mb, plain_training
from fedasr.cli import common

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds timed for each figure.")
_CLIENTS = flags.DEFINE_integer("clients", 32, "Clients in a round.")
_DIM = flags.DEFINE_integer("dim", 144, "Width of the model; 144 gives 1.1M parameters.")
_BLOCKS = flags.DEFINE_integer("blocks", 4, "Blocks of the model.")
_FRAMES = flags.DEFINE_integer("frames", 200, "Frames of an utterance.")
_MEMORY = flags.DEFINE_bool("memory", True, "Whether to measure peak memory, too.")
_CHUNKS = flags.DEFINE_list("chunks", ["1", "4", "8", "all"], "Clients vmapped on a device.")

STEPS, BATCH, RAGGED = 4, 2, 16


def run() -> None:
    """Measures and prints."""
    common.configure_devices()
    import jax
    import optax

    from fedasr.data.batching import Batching, make_buckets
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import make_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import FixedSizeSampler

    recogniser = make_recogniser(
        "transformer", {"dim": _DIM.value, "mlp": 4 * _DIM.value, "blocks": _BLOCKS.value}
    )
    params = recogniser.init(jax.random.key(0))
    clients, frames = _CLIENTS.value, _FRAMES.value

    def simulation(corpus, batching, chunk):
        mechanism = Mechanism(
            0.1, "uniform", 0.01, FixedSizeSampler(len(corpus.users), len(corpus.users), seed=0)
        )
        update = local_training(recogniser.loss, optax.sgd(0.1))
        return Simulation(
            corpus,
            mechanism,
            FedAvg(update, optax.lamb(1e-3)),
            dataclasses.replace(batching, buckets=make_buckets([corpus])),
            hardware=Hardware(chunk=chunk),
        )

    plain = plain_training(recogniser.loss)
    uniform = RandomSpeech([STEPS * BATCH] * clients, frames)
    counts = [1 + i * (RAGGED - 1) // max(clients - 1, 1) for i in range(clients)]
    ragged = RandomSpeech([n * BATCH for n in counts], frames)
    fixed = Batching(BATCH, steps=STEPS)
    sims = {
        name: simulation(uniform, fixed, 0 if name == "all" else int(name))
        for name in _CHUNKS.value
    }
    sims["ragged"] = simulation(ragged, Batching(BATCH, epochs=1), 1)
    states = {name: sim.init(params) for name, sim in sims.items()}

    some = next(iter(sims[_CHUNKS.value[0]].batcher.chunks([0], 0)))[0]
    batches = [
        jax.device_put({name: x[0, i] for name, x in some.batches.items()}) for i in range(STEPS)
    ]

    def rounds(name):
        states[name], _ = next(iter(sims[name].run(states[name], 1)))
        return states[name].params

    work = clients * STEPS
    tasks = {
        "bound": (work, lambda: plain.central(params, batches, work)),
        "python_loop": (work, lambda: plain.one_by_one(params, batches, [STEPS] * clients)),
        "ragged_bound": (sum(counts), lambda: plain.central(params, batches, sum(counts))),
    } | {
        name: (sum(counts) if name == "ragged" else work, lambda name=name: rounds(name))
        for name in sims
    }
    speeds: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(_ROUNDS.value + 1):
        for name, (count, task) in tasks.items():
            began = time.perf_counter()
            jax.block_until_ready(task())
            if repeat:  # the first compiles
                speeds[name].append(count / (time.perf_counter() - began))
    median = {name: statistics.median(values) for name, values in speeds.items()}

    memory = {}
    for count in (clients, 8 * clients) if _MEMORY.value else ():
        corpus = RandomSpeech([STEPS * BATCH] * count, frames)
        sim = simulation(corpus, Batching(BATCH, steps=STEPS), 1)
        state = sim.init(params)

        def one_round(sim=sim, state=state):
            jax.block_until_ready(next(iter(sim.run(state, 1)))[0].params)

        one_round()
        memory[str(count)] = peak_rss_mb(one_round)

    if flags.FLAGS.plot:
        draw(median, memory, flags.FLAGS.plot)
    devices = jax.local_devices()
    common.show(
        {
            "bound": median["bound"],
            "python_loop": median["python_loop"],
            "chunk": {name: median[name] for name in _CHUNKS.value},
            "ragged": median["ragged"],
            "ragged_bound": median["ragged_bound"],
            "peak_rss_mb": memory,
            "device": f"{len(devices)} x {devices[0].device_kind}",
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
        }
    )


def draw(speeds: dict[str, float], memory: dict[str, float], path: str) -> None:
    """Client steps per second of everything timed, and peak memory by number of clients."""
    names = {name: f"chunk {name}" for name in _CHUNKS.value}
    rows = {names.get(name, name): {"": value} for name, value in speeds.items()}
    figure, (left, right) = plots.panels(2, 9, 3.4)
    plots.bars(left, rows, "client steps per second")
    peaks = {f"{count} clients": {"": value} for count, value in memory.items()}
    plots.bars(right, peaks, "peak resident memory, MB")
    plots.save(figure, path)


if __name__ == "__main__":
    plots.define_flag()
    common.main(run)
