"""Batches that are computed in parts: what they hold, what they cost, and that nothing changes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import (
    Batching,
    ClientBatcher,
    Grid,
    LocalBatches,
    Padding,
    Shape,
    fitting_bucket,
    make_buckets,
    part_shapes,
)
from fedasr.data.batching.parts import cheapest
from fedasr.data.corpus import InMemoryCorpus, all_lengths
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import batch_gradient, local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import ShuffledSampler

GRID = Grid(2, {"x": 2, "y": 1}, {"y": 0.5})


def ragged_corpus(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return InMemoryCorpus(
        {
            f"u{user}": [
                {
                    "x": rng.normal(size=(rng.integers(1, 20), 3)).astype(np.float32),
                    "y": rng.integers(1, 9, rng.integers(1, 4)).astype(np.int32),
                    "w": np.float32(rng.normal()),
                }
                for _ in range(size)
            ]
            for user, size in enumerate(sizes)
        },
        ragged=("x", "y"),
    )


CORPUS = ragged_corpus([11, 3, 1, 7])
HOW = [
    {"batch_size": 4, "epochs": 2},
    {"batch_size": 4, "steps": 3},
    {"frames": 40, "epochs": 2},
    {"frames": 40, "epochs": 3, "max_steps": 4},
]


@given(
    needs=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=4),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_no_division_into_parts_costs_less(needs, shapes, data):
    shapes = [Shape(1, 3), *(Shape(*shape) for shape in shapes)]
    costs = data.draw(
        st.lists(st.integers(1, 50), min_size=len(shapes), max_size=len(shapes)), label="costs"
    )
    needs = np.sort(np.array(needs))
    least, kinds = cheapest(needs[None], shapes, costs)

    def brute(count):
        if count <= 0:
            return 0
        return min(
            cost + brute(count - shape.slots)
            for shape, cost in zip(shapes, costs, strict=True)
            if shape.bucket >= needs[count - 1]
        )

    assert [brute(count) for count in range(len(needs) + 1)] == least[0].tolist()
    left, spent = len(needs), 0
    while left > 0:
        shape = shapes[kinds[0, left]]
        assert shape.bucket >= needs[left - 1]
        spent, left = spent + costs[kinds[0, left]], left - shape.slots
    assert spent == least[0, -1]


def cells_of(corpus):
    return GRID.cells(all_lengths(corpus))


def shapes_of(corpus, user, slots):
    """Of the parts of a user all of whose examples are in every round."""
    buckets = cells_of(corpus)
    own = max(
        fitting_bucket(buckets, dict(zip(("x", "y"), pair, strict=True)))
        for pair in zip(*(corpus.lengths(user)[name].tolist() for name in ("x", "y")), strict=True)
    )
    return part_shapes(min(top for top in GRID.tops(buckets) if top >= own), slots, 2)


@pytest.mark.parametrize("how", HOW)
def test_parts_hold_the_batches_examples(how, dense):
    local = LocalBatches(**how)
    buckets = cells_of(CORPUS)
    whole = ClientBatcher(CORPUS, local, make_buckets([CORPUS]), 1, seed=3)
    parts = ClientBatcher(CORPUS, local, GRID, 1, seed=3, micro_batch=4)
    for user in range(4):
        shapes = shapes_of(CORPUS, user, 4)
        ((one, before),) = whole.chunks([user], 5)
        ((two, after),) = parts.chunks([user], 5)
        assert int(one.num_steps[0]) == int(two.num_steps[0])
        assert before.real == after.real <= after.computed
        store = jax.tree.map(lambda x: x[0], two.batches)
        expected, found = dense(one.batches), dense(two.batches)
        computed = 0
        for step in range(int(one.num_steps[0])):
            values = [np.sort(x["w"][0, step][x["mask"][0, step]]) for x in (expected, found)]
            np.testing.assert_array_equal(*values)
            for part, kind in enumerate(store.kinds[step, : store.parts[step]]):
                rows = store.index[step, part]
                slots = shapes[kind].slots
                assert (rows[slots:] == -1).all() and rows[0] >= 0
                inside = rows[rows >= 0]
                for name in ("x", "y"):
                    assert store.lengths[name][inside].max() <= buckets[shapes[kind].bucket][name]
                computed += slots * buckets[shapes[kind].bucket]["x"]
            assert (store.index[step, store.parts[step] :] == -1).all()
        assert computed == after.computed


def mean_loss(params, batch, key):
    """The mean of some function over the examples with y[0] > 2."""
    inside = jnp.arange(batch["x"].shape[1]) < batch["x_length"][:, None]
    sums = jnp.sum(jnp.where(inside[..., None], batch["x"], 0.0), axis=1)
    values = jnp.square(sums @ params["a"] - batch["w"])
    valid = batch["mask"] & (batch["y"][:, 0] > 2)
    mean = jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
    return mean, {"utterances": jnp.sum(valid, dtype=jnp.int32)}


@pytest.mark.parametrize("how", HOW[:3:2])
def test_gradient_is_that_of_the_whole_batch(how):
    local = LocalBatches(**how)
    params = {"a": jnp.arange(3.0)}
    gradient = jax.jit(batch_gradient(mean_loss))
    seen = 0
    for user in range(4):
        args = [
            ClientBatcher(CORPUS, local, make_buckets([CORPUS]), 1, seed=3),
            ClientBatcher(CORPUS, local, GRID, 1, seed=3, micro_batch=2),
        ]
        one, two = (next(b.chunks([user], 0))[0] for b in args)
        for step in range(int(one.num_steps[0])):
            results = [
                gradient(params, jax.tree.map(lambda x: x[0], c.batches), step, jax.random.key(0))
                for c in (one, two)
            ]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results
            )
            seen += int(results[0][0][1]["utterances"])
    assert seen > 20


@pytest.mark.parametrize("size", [1, 4])
def test_what_is_computed_has_the_shapes_and_no_other(size):
    local = LocalBatches(size, epochs=1)
    buckets, shapes = cells_of(CORPUS), shapes_of(CORPUS, 0, 2)
    batcher = ClientBatcher(CORPUS, local, GRID, 1, seed=3, micro_batch=2)
    seen = set()

    def loss(params, batch, key):
        seen.add(batch["x"].shape[:2])
        return mean_loss(params, batch, key)

    store = jax.tree.map(lambda x: x[0], next(batcher.chunks([0], 0))[0].batches)
    jax.eval_shape(batch_gradient(loss), {"a": jnp.zeros(3)}, store, 0, jax.random.key(0))
    assert seen == {(shape.slots, buckets[shape.bucket]["x"]) for shape in shapes}
    assert len(seen) > 1


def test_every_part_draws_from_a_key_of_its_own():
    local = LocalBatches(4, epochs=1)
    batcher = ClientBatcher(CORPUS, local, GRID, 1, seed=3, micro_batch=1)

    def loss(params, batch, key):
        return jax.random.uniform(key) + 0 * jnp.sum(params["a"]), {}

    store = jax.tree.map(lambda x: x[0], next(batcher.chunks([0], 0))[0].batches)
    key = jax.random.key(5)
    (value, _), _ = jax.jit(batch_gradient(loss))({"a": jnp.zeros(3)}, store, 0, key)
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, part))) for part in range(4)]
    assert store.parts[0] == 4 and len(set(drawn)) == 4
    np.testing.assert_allclose(value, np.mean(drawn), rtol=1e-6)


def simulate(micro_batch=0, buckets=None, how=HOW[0], devices=1, rounds=3, chunk=1, corpus=CORPUS):
    simulation = Simulation(
        corpus,
        Mechanism(1.0, "global", 0.0, ShuffledSampler(len(corpus.users), 3, 1)),
        FedAvg(local_training(mean_loss, optax.sgd(0.01)), optax.sgd(1.0)),
        Batching(**how, buckets=buckets, micro_batch=micro_batch),
        hardware=Hardware(jax.devices()[:devices], chunk=chunk),
        seed=4,
    )
    state = simulation.init({"a": jnp.zeros(3)})
    metrics = []
    for state, found in simulation.run(state, rounds):  # noqa: B007
        metrics.append(found)
    return np.asarray(state.params["a"]), metrics, simulation


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("how", HOW[:3])
def test_rounds_do_not_depend_on_the_parts(how, devices):
    whole, expected, _ = simulate(0, make_buckets([CORPUS]), how, chunk=3)
    parts, found, simulation = simulate(2, GRID, how, devices)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(expected, found, strict=True):
        assert (a.clients, a.steps, a.invalid) == (b.clients, b.steps, b.invalid)
        assert a.aux == b.aux and math.isclose(a.loss, b.loss, rel_tol=1e-5)
        assert b.padding.real == a.padding.real
        assert b.padding.fraction < a.padding.fraction
    assert simulation.compilations() <= 4  # a user of one short example, and users of few or many


def test_clients_side_by_side_on_a_device_are_refused():
    with pytest.raises(UserError, match="chunk=1"):
        simulate(2, GRID, chunk=2)
    with pytest.raises(UserError, match="Grid"):
        simulate(2, make_buckets([CORPUS]))


def test_lengths_must_vary():
    same = InMemoryCorpus({"a": [{"x": np.zeros((2, 1), np.float32)}]})
    with pytest.raises(UserError, match="vary"):
        ClientBatcher(same, LocalBatches(4, epochs=1), Grid(), 1, 0, micro_batch=2)


def lognormal(rng, mean, std, size):
    variance = math.log1p((std / mean) ** 2)
    return rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), size)


def published_durations(name, users, rng):
    """Seconds of each utterance of users whose minutes have the published mean and spread.

    The papers do not give the spread of utterances: LibriSpeech's are taken to be 12.3 s (3.8),
    Common Voice's 5.3 s (1.7), as hours and numbers of utterances of the corpora suggest.
    """
    if name == "librispeech":
        minutes = rng.normal(24.7, 4.9, users).clip(2)
        return [rng.normal(12.3, 3.8, round(m * 60 / 12.3)).clip(1.4, 30) for m in minutes]
    minutes = lognormal(rng, 2.8, 32.7, users).clip(0.02, 5049.6)
    return [lognormal(rng, 5.3, 1.7, max(1, round(m * 60 / 5.3))).clip(1, 30) for m in minutes]


@pytest.mark.parametrize(
    ("name", "seconds", "most"), [("librispeech", 360, 0.115), ("common_voice", 120, 0.135)]
)
def test_padding_of_the_published_corpora(name, seconds, most):
    """In rounds of the recipes, with 4 lengths to a doubling: 15 shapes, and at most 8 programs.

    8 shapes fitted to the lengths of all users came to at most 12%, but then every user had a say
    in the shapes of all others. A grid that does not know the lengths needs more shapes for it.
    """
    rng = np.random.default_rng(0)
    users = 1000
    corpus = InMemoryCorpus(
        {
            f"u{user:04d}": [
                {
                    "features": np.zeros((round(100 * duration), 0), np.float32),
                    "labels": np.zeros(1 + int(14 * duration), np.int8),
                }
                for duration in durations
            ]
            for user, durations in enumerate(published_durations(name, users, rng))
        },
        ragged=("features", "labels"),
    )
    local = LocalBatches(frames=100 * seconds, epochs=10)
    grid = Grid(4, {"features": 24, "labels": 4}, {"labels": 0.2})
    batcher = ClientBatcher(corpus, local, grid, 1, 0, select=("features",), micro_batch=2)
    total, programs = Padding(0, 0), set()
    # The users of Common Voice differ a thousandfold in their data: more are needed.
    rounds = 1 if name == "librispeech" else 3
    cohorts = np.random.default_rng(1).permutation(users)[: 20 * rounds].reshape(rounds, 20)
    for number, cohort in enumerate(cohorts):
        for chunk, padding in batcher.chunks(cohort, number):
            total += padding
            programs.add(tuple(x.shape for x in jax.tree.leaves(chunk)))
            assert len(chunk.batches.spans) <= 15
    assert len(programs) <= 8
    assert total.real > 0 and total.fraction <= most, (total.fraction, len(programs))
    # What is real is what the users have, ten times.
    expected = sum(
        int(np.sum(corpus.lengths(int(user))["features"])) for user in itertools.chain(*cohorts)
    )
    assert total.real == 10 * expected


def test_parts_of_a_batch_share_its_key():
    batcher = ClientBatcher(CORPUS, LocalBatches(4, epochs=1), GRID, 1, seed=3, micro_batch=1)

    def loss(params, batch, key):
        of_batch = jax.random.key_data(batch["batch_key"]).astype(jnp.float32) / 2.0**32
        return jnp.sum(of_batch) + 0 * jnp.sum(params["a"]), {}

    store = jax.tree.map(lambda x: x[0], next(batcher.chunks([0], 0))[0].batches)
    key = jax.random.key(5)
    (value, _), _ = jax.jit(batch_gradient(loss, True))({"a": jnp.zeros(3)}, store, 0, key)
    expected = np.asarray(jax.random.key_data(key), np.float64).sum() / 2**32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
