"""What a large population costs: opening its corpus, and sampling and batching a round's cohort.

    python -m experiments.benchmarks.population --users=1000000 --json

A corpus of so many users is written to a temporary folder (or to --dir, where it is kept and used
again): one utterance each, 8 to 24 frames of random features and a few labels, about 3 GB for a
million users. Then:

* write_seconds: writing it (0 where it was there);
* open_seconds, rss_mb: `open_corpus` in a fresh process that has imported it, and that process's
  resident memory afterwards, with the buckets computed; JAX is not loaded there;
* sample_seconds, batch_seconds: drawing a cohort, and reading and padding its data, on their own;
* round_seconds: whole rounds through `fedasr.federated.simulation.Simulation`, in which batching
  runs in a thread beside the computation. The model is the quickstart's (about 1M parameters); a
  client does one step on its one utterance, which is the least work that a client can have: a round
  of real utterances and several steps takes many times longer, for the same sampling;
* share: (sample_seconds + batch_seconds) / round_seconds;
* local_seconds, local_share (with --local): reading and writing the cohort's local parameters in a
  round, and its share of the round. The model then has an input layer of 6,480 numbers that is
  every user's own, and all users' are in the store (2.6 GB for 100,000 users).

Seconds are medians over --rounds rounds; the first, which compiles, is left out.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from fedasr.cli import common
from fedasr.data import records, writing
from fedasr.errors import UserError

MELS, SHORTEST, LONGEST, LABELS, KINDS = 80, 8, 24, 2, 512

_OPEN = """
import json, sys, time
from pathlib import Path
from fedasr.data.batching import make_buckets
from fedasr.data.records import open_corpus
began = time.perf_counter()
corpus = open_corpus(sys.argv[1], "train")
seconds = time.perf_counter() - began
make_buckets([corpus])
status = Path("/proc/self/status")
if status.exists():
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS"))
    rss = int(line.split()[1]) / 1024
else:  # the peak, outside Linux
    import resource
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([seconds, rss]))
"""


class TinyPopulation:
    """Many users with one tiny utterance each, one of a few hundred, made when read."""

    def __init__(self, users: int) -> None:
        rng = np.random.default_rng(0)
        frames = rng.integers(SHORTEST, LONGEST + 1, KINDS)
        labels = rng.integers(1, LABELS + 1, KINDS)
        self._kinds = [
            {
                "features": rng.standard_normal((n, MELS), np.float32).astype(np.float16),
                "labels": rng.integers(1, 27, m).astype(np.int32),
            }
            for n, m in zip(frames, labels, strict=True)
        ]
        self.users = [f"user-{i:08d}" for i in range(users)]
        self.sizes = np.ones(users, np.int64)
        self._lengths = {
            "features": np.resize(frames, users).astype(np.int32),
            "labels": np.resize(labels, users).astype(np.int32),
        }

    def lengths(self, user: int) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        return {key: values[user : user + 1] for key, values in self._lengths.items()}

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.all_lengths`."""
        return self._lengths

    def get(self, user: int, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """See `fedasr.data.corpus.Corpus`."""
        return [self._kinds[user % KINDS] for _ in indices]


def write(folder: Path, users: int) -> float:
    """Writes the corpus unless the folder has it; returns the seconds that took.

    Raises:
      UserError: the folder holds another corpus.
    """
    if (folder / records.METADATA_FILE).exists():
        if records.read_metadata(folder).get("population") != users:
            raise UserError(f"{folder} holds another corpus: choose another --dir")
        return 0.0
    began = time.perf_counter()
    writing.write_corpus(folder, {"train": TinyPopulation(users)}, {"population": users})
    return time.perf_counter() - began


def measure_opening(folder: Path) -> tuple[float, float]:
    """(seconds to open, resident MB) in a fresh process."""
    command = [sys.executable, "-c", _OPEN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, rss = json.loads(done.stdout)
    return seconds, rss


def measure_rounds(folder: Path) -> dict[str, Any]:
    """The figures of sampling, batching and whole rounds."""
    import jax

    from fedasr.data.batching import Batching, ClientBatcher, make_buckets
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.server import make_optimizer
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import ARRAYS, make_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import FixedSizeSampler
    from fedasr.recipes import quickstart

    config = quickstart.get_config()
    config.model.options.input_layer = flags.FLAGS.local
    recogniser = make_recogniser(config.model.name, config.model.options.to_dict())
    params = recogniser.init(jax.random.key(0))
    corpus = records.open_corpus(folder, "train")
    sampler = FixedSizeSampler(
        len(corpus.users), min(flags.FLAGS.cohort, len(corpus.users)), seed=0
    )
    buckets = make_buckets([corpus])
    local = Batching(1, steps=1, buckets=buckets, select=ARRAYS)
    devices = jax.local_device_count()
    chunk = flags.FLAGS.chunk or -(-sampler.slots // devices)

    batcher = ClientBatcher(corpus, local, buckets, chunk * devices, 0, ARRAYS, devices)
    sampling, batching = [], []
    for round in range(flags.FLAGS.rounds + 1):
        began = time.perf_counter()
        users = sampler.cohort(round)
        sampled = time.perf_counter()
        for _ in batcher.chunks(users, round):
            pass
        sampling.append(sampled - began)
        batching.append(time.perf_counter() - sampled)

    simulation = Simulation(
        corpus,
        Mechanism(0.1, "uniform", 0.01, sampler),
        FedAvg(
            local_training(recogniser.loss, make_optimizer("sgd", 0.1), grad_clip=1.0),
            make_optimizer(config.server.optimizer, config.server.learning_rate),
            store=filled_store(folder, params, len(corpus.users)) if flags.FLAGS.local else None,
        ),
        local,
        hardware=Hardware(chunk=chunk),
    )
    rounds, local_seconds = [], []
    for _, metrics in simulation.run(simulation.init(params), flags.FLAGS.rounds + 1):
        rounds.append(metrics.seconds)
        if simulation.store is not None:
            local_seconds.append(simulation.store.seconds)
            simulation.store.seconds = 0.0
    sample, batch, whole = (
        statistics.median(values[1:]) for values in (sampling, batching, rounds)
    )
    own = {}
    if simulation.store is not None:
        seconds = statistics.median(local_seconds[1:])
        own = {"local_seconds": seconds, "local_share": seconds / whole}
    return own | {
        "sample_seconds": sample,
        "batch_seconds": batch,
        "round_seconds": whole,
        "share": (sample + batch) / whole,
        "cohort": sampler.slots,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }


def filled_store(folder: Path, params: Any, users: int) -> Any:
    """A store with a row for every user that adds up its own seconds."""
    from fedasr.federated.local import LocalStore, make_layout

    class TimedStore(LocalStore):
        seconds = 0.0

        def gather(self, *args):
            return self._timed(super().gather, *args)

        def write(self, *args):
            return self._timed(super().write, *args)

        def commit(self):
            return self._timed(super().commit)

        def _timed(self, method, *args):
            began = time.perf_counter()
            result = method(*args)
            self.seconds += time.perf_counter() - began
            return result

    layout = make_layout(params, ("^input_layer/",))
    store = TimedStore(folder / "local", layout, users)
    store.restore(0)
    init = np.asarray(layout.extract(params))
    for start in range(0, users, 1000):
        block = range(start, min(start + 1000, users))
        store.write(block, np.tile(init, (len(block), 1)))
    store.commit()
    store.round, store.seconds = 0, 0.0  # the model's first round is still to come
    return store


def run() -> None:
    """Measures and prints."""
    common.configure_devices()
    with tempfile.TemporaryDirectory(prefix="fedasr-population-") as temporary:
        folder = Path(flags.FLAGS.dir or temporary)
        written = write(folder, flags.FLAGS.users)
        opening, rss = measure_opening(folder)
        common.show(
            {
                "users": flags.FLAGS.users,
                "write_seconds": written,
                "open_seconds": opening,
                "rss_mb": rss,
                **measure_rounds(folder),
            }
        )


def _define_flags() -> None:
    # Not when this is imported: other programs have flags of the same names.
    flags.DEFINE_integer("users", 1_000_000, "Users of the corpus.", lower_bound=1)
    flags.DEFINE_integer("cohort", 1024, "Users in a round.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Rounds timed.", lower_bound=1)
    flags.DEFINE_integer("chunk", 8, "Clients vmapped on a device.", lower_bound=0)
    flags.DEFINE_bool("local", False, "Users have local parameters, see above.")
    flags.DEFINE_string("dir", None, "Keep the corpus here; default: a temporary folder.")


if __name__ == "__main__":
    _define_flags()
    common.main(run)
