"""Rounds from a corpus that the devices keep are those from one that is read as users take part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.batching import (
    Batching,
    ClientBatcher,
    Grid,
    LocalBatches,
    arrays,
    make_buckets,
    make_resident,
)
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.cohort import client_mesh, replicated
from fedasr.federated.hardware import Hardware
from fedasr.federated.local import LocalStore, make_layout
from fedasr.federated.simulation import Simulation
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import PoissonSampler

MULTIPLES = {"x": 4, "y": 2}
KEEP = ("x", "y", "z")


class Watched(InMemoryCorpus):
    reads = 0

    def get(self, user, indices):
        self.reads += 1
        return super().get(user, indices)


def make_corpus():
    rng = np.random.default_rng(0)

    def example():
        return {
            "x": rng.normal(size=(rng.integers(1, 14), 3)).astype(np.float16),
            "y": rng.integers(1, 9, rng.integers(0, 4)).astype(np.int32),
            "z": rng.normal(size=2).astype(np.float32),
            "name": np.array(b"left out"),
        }

    sizes = [5, 1, 3, 2, 9, 1, 4]
    return Watched({f"u{i}": [example() for _ in range(n)] for i, n in enumerate(sizes)})


CORPUS = make_corpus()


def loss(params, batch, key):
    """Reads every array, and would show any frame beyond an example's end."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(batch["mask"])))
    noise = jax.vmap(lambda k: jax.random.normal(k, ()))(keys)
    frames = jnp.sum(batch["x"].astype(jnp.float32) ** 2, axis=(1, 2))
    wanted = jnp.sum(batch["y"], axis=1) / 9 + batch["x_length"] / 14 + batch["y_length"]
    error = jnp.tanh(frames * params["a"] + batch["z"] @ params["b"]) - wanted + 0.1 * noise
    count = jnp.sum(batch["mask"])
    value = jnp.sum(jnp.where(batch["mask"], error**2, 0.0)) / jnp.maximum(count, 1)
    return value, {"utterances": count.astype(jnp.float32)}


PARAMS = {"a": jnp.float32(0.1), "b": jnp.float32([0.3, -0.2])}
HOW = [{"batch_size": 2, "steps": 3}, {"batch_size": 2, "epochs": 2}, {"frames": 16, "epochs": 1}]


def rounds(resident, how, chunk, devices, parts, own=None, model_devices=1):
    simulation = Simulation(
        CORPUS,
        Mechanism(0.5, "uniform", 0.1, PoissonSampler(7, 4.0, seed=1)),
        FedAvg(local_training(loss, optax.sgd(0.1)), optax.sgd(1.0), store=own),
        Batching(
            **how,
            buckets=Grid(1, MULTIPLES, {"y": 0.5}),
            select=KEEP,
            micro_batch=2 if parts else 0,
            resident=make_resident(CORPUS, make_buckets([CORPUS], 1, MULTIPLES), KEEP)
            if resident
            else None,
        ),
        hardware=Hardware(jax.devices()[:devices], model_devices, chunk),
        seed=5,
    )
    assert simulation.chunk_bytes(PARAMS) > 0
    CORPUS.reads = 0
    done = list(simulation.run(simulation.init(PARAMS), 4))
    assert (CORPUS.reads == 0) == resident
    return done, simulation.compilations()


def assert_same(expected, found):
    for (a, x), (b, y) in zip(expected, found, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a.params, b.params
        )
        assert (x.clients, x.steps, x.invalid) == (y.clients, y.steps, y.invalid)
        assert x.padding.real == y.padding.real and x.aux == y.aux
        np.testing.assert_allclose(x.loss, y.loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "chunk", "devices", "parts"),
    [
        (HOW[0], 1, 1, False),
        (HOW[0], 3, 2, False),
        (HOW[1], 1, 2, False),
        (HOW[1], 3, 2, False),
        (HOW[2], 1, 1, False),
        (HOW[2], 1, 2, True),
    ],
)
def test_rounds_are_the_same(how, chunk, devices, parts):
    expected, most = rounds(False, how, chunk, devices, parts)
    found, programs = rounds(True, how, chunk, devices, parts)
    assert sum(m.clients for _, m in expected) > 8
    assert programs <= most + 1  # the room for steps is rounded alone, not with that for examples
    assert_same(expected, found)
    if chunk == 1:  # otherwise stores of other room are not trained side by side
        for (_, x), (_, y) in zip(expected, found, strict=True):
            assert x.padding == y.padding


def test_clients_over_two_devices():
    expected, found = (rounds(r, HOW[1], 1, 2, False, model_devices=2)[0] for r in (False, True))
    assert_same(expected, found)


def test_local_parameters_are_trained_as_well(tmp_path):
    layout = make_layout(PARAMS, ("^b$",))
    found, rows = [], []
    for resident in (False, True):
        with LocalStore(tmp_path / str(resident), layout, len(CORPUS.users)) as store:
            found.append(rounds(resident, HOW[1], 1, 2, False, own=store)[0])
            rows.append(store.gather(range(7), np.asarray(layout.extract(PARAMS))))
    assert_same(*found)
    np.testing.assert_allclose(*rows, rtol=1e-5, atol=1e-6)
    assert np.abs(rows[0] - rows[0][0]).max() > 1e-3


@pytest.mark.parametrize("ragged", [("x", "y"), ()])
def test_a_resident_corpus_is_every_example_in_order(ragged):
    """Also where the buckets name an array that the corpus knows to be of one length."""
    examples = [
        {
            "x": np.full((i % 3 if ragged else 2, 2), i, np.float16),
            "y": np.arange(4) + i,
            "w": np.float32(i),
        }
        for i in range(6)
    ]
    corpus = InMemoryCorpus({"a": examples[:1], "b": examples[1:4], "c": examples[4:]}, ragged)
    buckets = ({"x": 2, "y": 4},)
    found = make_resident(corpus, buckets)
    assert set(found.offsets) == set(found.lengths) == {"x", "y"}
    np.testing.assert_array_equal(found.arrays["w"], np.arange(6.0))
    for name in ("x", "y"):
        assert found.arrays[name].dtype == examples[0][name].dtype
        assert found.offsets[name].dtype == found.lengths[name].dtype == np.int32
        for i, example in enumerate(examples):
            own = slice(found.offsets[name][i], found.offsets[name][i] + found.lengths[name][i])
            np.testing.assert_array_equal(found.arrays[name][own], example[name])
    batcher = ClientBatcher(corpus, LocalBatches(1, epochs=1), buckets, 3, 0, resident=found)
    rows = {}
    for chunk, _ in batcher.chunks(range(3), 0):
        assert chunk.batches.arrays == {}
        there = zip(chunk.num_steps, chunk.user.tolist(), chunk.batches.index, strict=True)
        rows |= {user: index for steps, user, index in there if steps}
    for user, own in enumerate([{0}, {1, 2, 3}, {4, 5}]):
        assert set(rows[user][rows[user] >= 0].tolist()) == own
    assert set(make_resident(corpus, buckets, select=("x",)).arrays) == {"x"}


def test_what_makes_no_sense_is_refused(monkeypatch):
    buckets = make_buckets([CORPUS], 2, MULTIPLES)
    found = make_resident(CORPUS, buckets, KEEP)
    fewer = InMemoryCorpus({"a": CORPUS.get(0, range(5))}, ("x", "y"))
    with pytest.raises(UserError, match="another corpus"):
        ClientBatcher(fewer, LocalBatches(1, steps=1), buckets, 1, 0, resident=found)
    mechanism = Mechanism(0.5, "uniform", 0.1, PoissonSampler(7, 4.0, seed=1), weighting="bounded")
    with pytest.raises(UserError, match="weigh"):
        Simulation(
            CORPUS,
            mechanism,
            FedAvg(
                local_training(loss, optax.sgd(0.1)),
                optax.sgd(1.0),
                weigh=lambda params, delta, batches, key: jnp.float32(1),
            ),
            Batching(1, steps=1, buckets=buckets, select=KEEP, resident=found),
        )
    monkeypatch.setattr(arrays, "MAX_ARRAY_BYTES", 100)
    with pytest.raises(UserError, match="'x' of all users"):
        make_resident(CORPUS, buckets, KEEP)


def test_what_lies_on_the_devices_is_not_copied():
    placed = hosts.transfer(
        make_resident(CORPUS, make_buckets([CORPUS], 2, MULTIPLES), KEEP),
        replicated(client_mesh(jax.devices()[:2])),
    )
    again = hosts.transfer(placed, replicated(client_mesh(jax.devices()[:2])))
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(again), strict=True):
        pointers = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in (a, b)]
        assert pointers[0] == pointers[1]
