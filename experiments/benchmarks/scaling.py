"""Time and memory of rounds as cohort and population grow.

    python -m experiments.benchmarks.scaling [--users=1000,1000000] [--cohorts=64,1024,4096,10000]
        [--rounds=2] [--chunk=8] [--dir=DIR] [--plot=FILE.png] [--json]

For each population a corpus is written (see `experiments.benchmarks.population`; --dir keeps it),
and for each cohort a fresh process runs rounds of a model of 20,000 parameters on it, one step a
client, with per-layer clipping, noise and LAMB:

* peak_mb: the process's peak resident memory, all devices' buffers included on a CPU;
* device_mb: the peak that an accelerator's allocator reports; None on a CPU;
* round_seconds: of a round, the first, which compiles, left out;
* clients_per_second.

`growth` is the largest peak of any cohort over that of the smallest, by population.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmarks import plots, population
from fedasr.cli import common
from fedasr.data.records import open_corpus
from fedasr.errors import UserError

_MODEL = {"dim": 32, "mlp": 64, "blocks": 1, "heads": 2, "dropout": 0.0, "layer_drop": 0.0}


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of the same names.
    flags.DEFINE_list("users", ["1000", "1000000"], "Populations.")
    flags.DEFINE_list("cohorts", ["64", "1024", "4096", "10000"], "Users in a round.")
    flags.DEFINE_integer("rounds", 2, "Rounds timed.", lower_bound=1)
    flags.DEFINE_integer("chunk", 8, "Clients vmapped on a device.", lower_bound=1)
    flags.DEFINE_string("dir", None, "Keep the corpora here; default: a temporary folder.")
    plots.define_flag()


def measure(folder: str, cohort: int, rounds: int, chunk: int) -> dict[str, Any]:
    """The figures of one cohort, in this process, which should do nothing else."""
    import resource

    import jax

    from fedasr.data.batching import Batching, make_buckets
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.server import make_optimizer
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import ARRAYS, make_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import FixedSizeSampler

    recogniser = make_recogniser("transformer", _MODEL)
    corpus = open_corpus(folder, "train")
    simulation = Simulation(
        corpus,
        Mechanism(0.1, "uniform", 0.01, FixedSizeSampler(len(corpus.users), cohort, seed=0)),
        FedAvg(
            local_training(recogniser.loss, make_optimizer("sgd", 0.1), grad_clip=1.0),
            make_optimizer("lamb", 0.01),
        ),
        Batching(1, steps=1, buckets=make_buckets([corpus]), select=ARRAYS),
        hardware=Hardware(chunk=chunk),
    )
    state = simulation.init(recogniser.init(jax.random.key(0)))
    seconds = [metrics.seconds for _, metrics in simulation.run(state, rounds + 1)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(s.get("peak_bytes_in_use", 0) for s in stats)
    return {
        "peak_mb": peak / 1024 if sys.platform != "darwin" else peak / 2**20,
        "device_mb": device / 2**20 if device else None,
        "round_seconds": sum(seconds) / len(seconds),
        "clients_per_second": cohort * len(seconds) / sum(seconds),
    }


_MEASURE = """
import json, sys
from fedasr.cli import common
common.configure_devices()
from experiments.benchmarks.scaling import measure
print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
"""


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Seconds and peak memory against the cohort, a line for each population."""
    figure, both = plots.panels(2, 8, 3.4)
    for axes, key, label in zip(
        both, ("round_seconds", "peak_mb"), ("seconds a round", "peak memory, MB"), strict=True
    ):
        for users in dict.fromkeys(row["users"] for row in rows):
            own = [row for row in rows if row["users"] == users]
            x = [row["cohort"] for row in own]
            axes.plot(x, [row[key] for row in own], "o-", label=f"{users:,} users")
        axes.set(xscale="log", xlabel="users in a round", ylabel=label)
        axes.set_ylim(bottom=0)
    axes.legend()
    plots.save(figure, path)


def run() -> None:
    """Measures and prints."""
    options = flags.FLAGS
    try:
        populations, cohorts = (
            sorted({int(text) for text in texts}) for texts in (options.users, options.cohorts)
        )
    except ValueError as error:
        raise UserError(f"--users and --cohorts must be whole numbers: {error}") from error
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedasr-scaling-") as temporary:
        for users in populations:
            folder = Path(options.dir or temporary) / str(users)
            population.write(folder, users)
            for cohort in cohorts:
                if cohort > users:
                    continue
                numbers = map(str, (cohort, options.rounds, options.chunk))
                command = [sys.executable, "-c", _MEASURE, str(folder), *numbers]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"cohort {cohort} of {users} failed: {done.stderr[-2000:]}")
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append({"users": users, "cohort": cohort, **row})
                print(rows[-1], file=sys.stderr, flush=True)
    growth = {}
    for users in populations:
        peaks = [row["peak_mb"] for row in rows if row["users"] == users]
        if peaks:
            growth[str(users)] = max(peaks) / peaks[0]
    if options.plot:
        draw(rows, options.plot)
    common.show({"rows": rows, "growth": growth})


if __name__ == "__main__":
    _define_flags()
    common.main(run)
