"""fedasr's rounds (mode "rounds"), with per-layer clipping, noise and LAMB; or in their place the
same steps one jitted call after another, client by client ("loop"), or as one jitted loop without
any clients ("bound")."""

import sys

import jax
import optax
from work import KINDS, parse, serve

from fedasr.data.batching import ClientBatcher, LocalBatches, make_buckets
from fedasr.data.corpus import InMemoryCorpus
from fedasr.data.sampling import FixedSizeSampler
from fedasr.federated.client import local_training
from fedasr.federated.simulation import Simulation
from fedasr.models.recogniser import make_recogniser
from fedasr.privacy.mechanism import Mechanism

work = parse(sys.argv[1])
sizes = {"dim": work.dim, "mlp": work.mlp, "blocks": work.blocks, "heads": work.heads}
recogniser = make_recogniser("transformer", sizes)
params = recogniser.init(jax.random.key(0))
optimizer = optax.sgd(0.1)


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
    simulation = Simulation(
        corpus,
        Mechanism(0.1, "uniform", 0.01, FixedSizeSampler(work.clients, work.clients, seed=0)),
        local_training(recogniser.loss, optimizer),
        optax.lamb(1e-3),
        LocalBatches(work.batch, **how),
        buckets=make_buckets([corpus]),
    )
    state = [simulation.init(params)]

    def round():
        state[0], _ = next(simulation.run(state[0], 1))

    return round


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
    batches = first_batches(kind)
    clip = optax.clip_by_global_norm(1.0)
    counts = list(work.own(kind).values())

    def step(local, batch, key):
        grads = jax.grad(recogniser.loss, has_aux=True)(local, batch, key)[0]
        grads, _ = clip.update(grads, clip.init(local))
        updates, _ = optimizer.update(grads, optimizer.init(local))
        return optax.apply_updates(local, updates)

    one_step = jax.jit(step)
    add = jax.jit(lambda a, p, q: jax.tree.map(lambda x, y, z: x + y - z, a, p, q))

    @jax.jit
    def central(local, batch, count):
        root = jax.random.key(0)
        return jax.lax.fori_loop(
            0, count, lambda i, p: step(p, batch, jax.random.fold_in(root, i)), local
        )

    def loop():
        total = jax.tree.map(jax.numpy.zeros_like, params)
        for client, count in enumerate(counts):
            local, key = params, jax.random.key(client)
            for i in range(count):
                own = batches[i % len(batches)]
                local = one_step(local, own, jax.random.fold_in(key, i))
            total = add(total, params, local)
        jax.block_until_ready(total)

    def bound():
        jax.block_until_ready(central(params, batches[0], sum(counts)))

    return {"loop": loop, "bound": bound}[work.mode]


serve({kind: (rounds if work.mode == "rounds" else plain)(kind) for kind in KINDS})
