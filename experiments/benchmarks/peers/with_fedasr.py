"""fedasr's rounds (mode "rounds"), with per-layer clipping, noise and LAMB, also from a corpus that
the devices keep ("rounds resident"); or in their place the same steps one jitted call at a time,
client by client ("loop"), or as one jitted loop without any clients ("bound")."""

import sys

import jax
import optax
from work import KINDS, parse, serve

from experiments.benchmarks.workload import plain_training
from fedasr.cli import common
from fedasr.data.batching import Batching, ClientBatcher, LocalBatches, make_buckets, make_resident
from fedasr.data.corpus import InMemoryCorpus
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.simulation import Simulation
from fedasr.models.recogniser import make_recogniser
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler

work = parse(sys.argv[1])
federated = work.mode.startswith("rounds")
if federated:  # as the programs that train do
    common.keep_memory()
sizes = {"dim": work.dim, "mlp": work.mlp, "blocks": work.blocks, "heads": work.heads}
recogniser = make_recogniser("transformer", sizes)
params = recogniser.init(jax.random.key(0))
training = plain_training(recogniser.loss)


def corpus_of(kind):
    users = {}
    for client, steps in work.own(kind).items():
        data = work.data(client, steps)
        rows = range(len(data["labels"]))
        users[f"{client:04d}"] = [{name: data[name][i] for name in data} for i in rows]
    return InMemoryCorpus(users, ragged=("features", "labels"))


def rounds(kind):
    corpus = corpus_of(kind)
    how = {"steps": work.steps} if kind == "uniform" else {"epochs": 1}
    buckets = make_buckets([corpus])
    simulation = Simulation(
        corpus,
        Mechanism(0.1, "uniform", 0.01, FixedSizeSampler(work.clients, work.clients, seed=0)),
        FedAvg(local_training(recogniser.loss, optax.sgd(0.1)), optax.lamb(1e-3)),
        Batching(
            work.batch,
            **how,
            buckets=buckets,
            resident=make_resident(corpus, buckets) if work.mode == "rounds resident" else None,
        ),
    )
    stream = simulation.run(simulation.init(params), 1_000_000)
    return lambda: next(stream)


def first_batches(kind):
    """The batches of a client, on the device."""
    corpus = corpus_of(kind)
    how = LocalBatches(work.batch, steps=work.steps)
    batcher = ClientBatcher(corpus, how, make_buckets([corpus]), 1, 0)
    chunk, _ = next(batcher.chunks([0], 0))
    return [
        jax.device_put({n: x[0, i] for n, x in chunk.batches.items()}) for i in range(work.steps)
    ]


def plain(kind):
    batches, counts = first_batches(kind), list(work.own(kind).values())
    if work.mode == "loop":
        return lambda: jax.block_until_ready(training.one_by_one(params, batches, counts))
    return lambda: jax.block_until_ready(training.central(params, batches, sum(counts)))


serve({kind: (rounds if federated else plain)(kind) for kind in KINDS})
