"""What the rounds of each algorithm cost beside those of federated averaging.

    python -m experiments.benchmarks.algorithms [--json]

The workload of `cohort`, smaller: 8 clients x 4 steps x 2 utterances x 200 frames through a CTC
Transformer, in turns in one process. Figures are ratios of the processor's time (which other load
on the machine moves less than time on the clock) of a round to that of federated averaging's in the
same turn, the median over the rounds timed; `round_seconds` is federated averaging's. `store` is
the share of a round that reading and writing 8 rows takes where the store has so many users.
"""

import statistics
import tempfile
import time

import numpy as np
from absl import flags

from experiments.benchmarks.workload import RandomSpeech
from fedasr.cli import common

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds timed for each figure.")
_CLIENTS = flags.DEFINE_integer("clients", 8, "Clients in a round.")
_DIM = flags.DEFINE_integer("dim", 96, "Width of the model.")
_BLOCKS = flags.DEFINE_integer("blocks", 2, "Blocks of the model.")
_NAMES = flags.DEFINE_list("algorithms", [], "Beside federated averaging; all if empty.")
_USERS = flags.DEFINE_integer("users", 100_000, "Users of the store that is timed.")

STEPS, BATCH, FRAMES = 4, 2, 200


def run() -> None:
    """Measures and prints."""
    common.configure_devices()
    import jax
    import optax

    from fedasr.data.batching import Batching, make_buckets
    from fedasr.federated.algorithms import ALGORITHMS, Facts, make_algorithm, memory_layout
    from fedasr.federated.client import local_training
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.local import LocalStore
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import make_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import AsynchronousSampler, FixedSizeSampler

    recogniser = make_recogniser(
        "transformer", {"dim": _DIM.value, "mlp": 4 * _DIM.value, "blocks": _BLOCKS.value}
    )
    params = recogniser.init(jax.random.key(0))
    clients = _CLIENTS.value
    corpus = RandomSpeech([STEPS * BATCH] * 2 * clients, FRAMES)
    batching = Batching(BATCH, steps=STEPS, buckets=make_buckets([corpus]))
    update = local_training(recogniser.loss, optax.sgd(0.1))

    def simulation(name, folder):
        layout = memory_layout(name, params)
        store = None if layout is None else LocalStore(folder, layout, 2 * clients)
        sampler = FixedSizeSampler(2 * clients, clients, seed=0)
        if name == "fedbuff":
            sampler = AsynchronousSampler(2 * clients, clients, clients, seed=0)
        algorithm = make_algorithm(name, update, optax.lamb(1e-3), Facts(0.5, 0.4), {}, store=store)
        mechanism = Mechanism(0.1, "uniform", 0.0, sampler)
        return Simulation(corpus, mechanism, algorithm, batching, hardware=Hardware(chunk=1))

    with tempfile.TemporaryDirectory() as folder:
        names = ["federated", *(_NAMES.value or ALGORITHMS)]
        sims = {name: simulation(name, f"{folder}/{name}") for name in names if name != "fedrep"}
        states = {name: sim.init(params) for name, sim in sims.items()}
        used: dict[str, list[float]] = {name: [] for name in sims}
        for repeat in range(_ROUNDS.value + 1):
            for name, sim in sims.items():
                began = time.process_time()
                states[name], _ = next(iter(sim.run(states[name], 1)))
                jax.block_until_ready(states[name].params)
                if repeat:  # the first compiles
                    used[name].append(time.process_time() - began)
        plain = used["federated"]
        ratios = {
            name: statistics.median(a / b for a, b in zip(mine, plain, strict=True))
            for name, mine in used.items()
        }
        layout = memory_layout("scaffold", params)
        assert layout is not None
        with LocalStore(f"{folder}/many", layout, _USERS.value) as store:
            seconds = _store_seconds(store, clients, _ROUNDS.value)
    per_round = statistics.median(plain)
    common.show(
        {
            "ratio": ratios,
            "round_seconds": per_round,
            "store": seconds / per_round,
            "store_users": _USERS.value,
            "device": f"{len(jax.local_devices())} x {jax.local_devices()[0].device_kind}",
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
        }
    )


def _store_seconds(store, clients: int, rounds: int) -> float:
    """Of reading and writing a cohort's rows, the median."""
    rng = np.random.default_rng(0)
    init = np.zeros(store.layout.size, np.float32)
    found = []
    for round in range(rounds):
        users = rng.choice(store.users, clients, replace=False)
        began = time.process_time()
        store.write(users, store.gather(users, init))
        store.commit()
        store.release(round)
        found.append(time.process_time() - began)
    return statistics.median(found)


if __name__ == "__main__":
    common.main(run)
