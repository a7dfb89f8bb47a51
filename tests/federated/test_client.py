import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import ClientBatcher, LocalBatches, arrays
from fedasr.data.corpus import InMemoryCorpus
from fedasr.federated import client as clients
from fedasr.federated.client import local_training, take_batch, view_of_client

STEPS, BATCH, FEATURES, OUTPUTS = 5, 3, 4, 2


def mean_squares(params, batch, key):
    del key
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    mask = batch["mask"].astype(jnp.float32)
    values = 0.5 * jnp.sum(error**2, axis=-1)
    loss = jnp.sum(jnp.where(batch["mask"], values, 0.0)) / jnp.maximum(mask.sum(), 1)
    return loss, {"examples": jnp.sum(batch["mask"], dtype=jnp.int32)}


def numpy_gradient(params, batch):
    """Loss and gradient of `mean_squares` in float64."""
    mask = batch["mask"]
    x, y = batch["x"][mask].astype(np.float64), batch["y"][mask].astype(np.float64)
    error = x @ params["w"] + params["b"] - y
    count = max(mask.sum(), 1)
    loss = 0.5 * (error**2).sum() / count
    return loss, {"w": x.T @ error / count, "b": error.sum(0) / count}


def random_params(rng):
    return {
        "w": rng.normal(size=(FEATURES, OUTPUTS)).astype(np.float32),
        "b": rng.normal(size=OUTPUTS).astype(np.float32),
    }


def random_batches(rng, scale=1.0):
    """The first example of a batch is always there, the others perhaps."""
    mask = rng.random((STEPS, BATCH)) < 0.7
    mask[:, 0] = True
    return {
        "x": (scale * rng.normal(size=(STEPS, BATCH, FEATURES))).astype(np.float32),
        "y": rng.normal(size=(STEPS, BATCH, OUTPUTS)).astype(np.float32),
        "mask": mask,
    }


def by_hand(params, batches, num_steps, optimizer, grad_clip, proximal=0.0):
    """Delta, losses and clipped steps of a plain loop in float64 gradients."""
    with jax.enable_x64(True):
        start = {k: v.astype(np.float64) for k, v in params.items()}
        local, state = start, optimizer.init(jax.tree.map(jnp.asarray, start))
        losses, clipped = [], 0
        for step in range(num_steps):
            loss, grads = numpy_gradient(local, {k: v[step] for k, v in batches.items()})
            grads = {k: g + proximal * (local[k] - start[k]) for k, g in grads.items()}
            norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
            if grad_clip is not None and norm > grad_clip:
                grads = {k: g * grad_clip / norm for k, g in grads.items()}
                clipped += 1
            updates, state = optimizer.update(grads, state, local)
            local = {k: local[k] + np.asarray(updates[k]) for k in local}
            losses.append(loss)
    return {k: start[k] - local[k] for k in local}, losses, clipped


def assert_close(tree, expected, rtol=1e-5):
    for name, value in expected.items():
        # Deltas are differences of float32 parameters of size 1.
        atol = rtol * np.abs(value).max() + 2e-6
        np.testing.assert_allclose(np.asarray(tree[name]), value, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def sgd():
    return jax.jit(local_training(mean_squares, optax.sgd(0.3)))


@given(
    seed=st.integers(0, 2**32 - 1),
    num_steps=st.integers(0, STEPS),
    scale=st.sampled_from([0.03, 0.3, 3.0]),
)
@settings(deadline=None, max_examples=40)
def test_sgd_equals_a_plain_loop(sgd, seed, num_steps, scale):
    rng = np.random.default_rng(seed)
    params, batches = random_params(rng), random_batches(rng, scale)
    delta, metrics = sgd(params, batches, num_steps, jax.random.key(0), STEPS)
    expected, losses, clipped = by_hand(params, batches, num_steps, optax.sgd(0.3), 1.0)
    assert_close(delta, expected)
    np.testing.assert_allclose(metrics.loss, np.mean(losses or [0.0]), rtol=1e-5)
    assert metrics.aux["examples"] == batches["mask"][:num_steps].sum()
    assert all(delta[k].dtype == params[k].dtype for k in params)
    if num_steps == 0:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(delta))
    if scale == 3.0:
        assert clipped == num_steps  # the clip is really at work


@pytest.mark.parametrize(
    ("optimizer", "grad_clip", "proximal"),
    [
        (optax.adam(0.1), 1.0, 0.0),
        (optax.sgd(0.1, momentum=0.9), None, 0.0),
        (optax.sgd(0.3), 1.0, 0.7),
        (optax.sgd(0.3), 0.25, 0.0),
    ],
    ids=["adam", "momentum without clip", "proximal", "small clip"],
)
def test_any_optimizer_equals_a_plain_loop(optimizer, grad_clip, proximal):
    rng = np.random.default_rng(3)
    params, batches = random_params(rng), random_batches(rng)
    update = jax.jit(
        local_training(mean_squares, optimizer, grad_clip=grad_clip, proximal=proximal)
    )
    delta, _ = update(params, batches, 4, jax.random.key(0))
    expected, _, _ = by_hand(params, batches, 4, optimizer, grad_clip, proximal)
    assert_close(delta, expected, rtol=1e-4)
    if proximal:
        plain, _, _ = by_hand(params, batches, 4, optimizer, grad_clip)
        assert np.abs(plain["w"] - expected["w"]).max() > 1e-2


def test_one_step_of_unit_sgd_is_the_clipped_gradient():
    rng = np.random.default_rng(5)
    params, batches = random_params(rng), random_batches(rng, 3.0)
    update = jax.jit(local_training(mean_squares, optax.sgd(1.0)))
    delta, _ = update(params, batches, 1, jax.random.key(0))
    _, grads = numpy_gradient(params, {k: v[0] for k, v in batches.items()})
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > 1
    assert_close(delta, {k: g / norm for k, g in grads.items()})


def test_padding_steps_do_not_matter_whatever_they_hold(sgd):
    rng = np.random.default_rng(7)
    params, batches = random_params(rng), random_batches(rng)
    clean = sgd(params, batches, 2, jax.random.key(0), STEPS)
    batches["x"][2:] = np.nan
    batches["y"][3:] = np.inf
    dirty = sgd(params, batches, 2, jax.random.key(0), STEPS)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    # The bound of the loop is not a number of steps.
    exact = sgd(params, batches, 2, jax.random.key(0), 2)
    jax.tree.map(np.testing.assert_array_equal, clean, exact)
    empty, metrics = sgd(params, jax.tree.map(lambda x: x * np.nan, batches) | {
        "mask": batches["mask"]
    }, 0, jax.random.key(0), STEPS)  # fmt: skip
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((empty, metrics)))


def test_every_step_has_randomness_of_its_own():
    def noise_as_gradient(params, batch, key):
        return jnp.sum(params * jax.random.normal(key, params.shape)) + 0 * batch["x"].sum(), {}

    update = jax.jit(local_training(noise_as_gradient, optax.sgd(1.0), grad_clip=None))
    batches = {"x": np.zeros((4, 1), np.float32)}
    params, key = np.zeros(6, np.float32), jax.random.key(1)
    sums = [np.asarray(update(params, batches, k, key)[0]) for k in range(5)]
    draws = np.diff(sums, axis=0)
    for i in range(4):
        expected = jax.random.normal(jax.random.fold_in(key, i), (6,))
        np.testing.assert_allclose(draws[i], expected, rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.round(draws, 3), axis=0)) == 4
    other = update(params, batches, 1, jax.random.key(2))[0]
    assert np.abs(other - sums[1]).max() > 0.1


def test_the_schedule_scales_the_learning_rate_by_round():
    rng = np.random.default_rng(5)
    params, batches = jax.tree.map(jnp.asarray, (random_params(rng), random_batches(rng)))
    scheduled = local_training(
        mean_squares, optax.sgd(0.2), schedule=lambda count: 0.5 ** jnp.maximum(count - 2, 0)
    )
    for round, rate in ((0, 0.2), (2, 0.2), (4, 0.05)):
        plain = local_training(mean_squares, optax.sgd(rate))
        expected, _ = plain(params, batches, 3, jax.random.key(0), round=7)
        delta, _ = scheduled(params, batches, 3, jax.random.key(0), round=jnp.int32(round))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), delta, expected)


def test_a_batch_from_a_store_is_the_dense_batch(dense, monkeypatch):
    """Also of the view of one client, whatever is left in memory that holds no example."""
    room = arrays.unfilled

    def filled(*args):
        array = room(*args)
        array.view(np.uint8).fill(0xFF)  # NaN in floats
        return array

    monkeypatch.setattr(arrays, "unfilled", filled)
    rng = np.random.default_rng(0)
    users = {
        f"u{i}": [
            {
                "x": rng.normal(size=(rng.integers(1, 9), 3)).astype(np.float16),
                "y": rng.integers(1, 9, rng.integers(0, 4)).astype(np.int32),
                "z": rng.normal(size=2).astype(np.float32),
                "w": np.float32(rng.normal()),
            }
            for _ in range(size)
        ]
        for i, size in enumerate([15, 9, 12])
    }
    corpus = InMemoryCorpus(users, ragged=("x", "y"))
    buckets = ({"x": 6, "y": 4}, {"x": 12, "y": 4})
    batcher = ClientBatcher(corpus, LocalBatches(2, epochs=3), buckets, 4, seed=0)
    gather = jax.jit(jax.vmap(take_batch, in_axes=(0, None)))
    of_one = jax.jit(
        lambda batches, client, step: take_batch(view_of_client(batches, client), step)
    )
    ((chunk, _),) = batcher.chunks(range(3), 0)
    expected = dense(chunk.batches)
    for step in range(chunk.num_steps.max()):
        batch = jax.device_get(gather(chunk.batches, step))
        assert batch.keys() == expected.keys()
        for name, value in batch.items():
            assert value.dtype == expected[name].dtype, name
            np.testing.assert_array_equal(value, expected[name][:, step], err_msg=name)
        for client in range(4):
            batch = jax.device_get(of_one(chunk.batches, client, step))
            assert batch.keys() == expected.keys()
            for name, value in batch.items():
                assert value.dtype == expected[name].dtype, name
                np.testing.assert_array_equal(value, expected[name][client, step], err_msg=name)


@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_a_correction_may_ask_for_gradients_where_training_began(grad_clip):
    """Of the same batch, clipped as the others; and asking changes nothing."""
    rng = np.random.default_rng(8)
    params, batches = random_params(rng), random_batches(rng)

    def watch(grads, seen, local=None, *, start_gradient, **extra):
        return grads, (start_gradient(), local)

    like = (params, params)
    correction = optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, like),
                                                       watch)  # fmt: skip
    update = local_training(mean_squares, optax.sgd(0.1), grad_clip=grad_clip)
    given = jax.tree.map(jnp.asarray, batches)
    args = (params, given, STEPS, jax.random.key(0))
    delta, _, (asked, local) = update(*args, correction=correction)
    _, expected = numpy_gradient(params, {k: v[STEPS - 1] for k, v in batches.items()})
    norm = np.sqrt(sum(np.sum(g**2) for g in expected.values()))
    scale = 1.0 if grad_clip is None else min(1.0, grad_clip / norm)
    assert grad_clip is None or scale < 0.9
    for name, found in asked.items():
        np.testing.assert_allclose(found, scale * expected[name], rtol=1e-4, atol=1e-5)
        assert np.abs(local[name] - params[name]).max() > 1e-3  # training has moved on
    for one, other in zip(jax.tree.leaves(delta), jax.tree.leaves(update(*args)[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_are_clipped_alike_on_accelerators(monkeypatch):
    """Where small arrays are summed together; `optax.clip_by_global_norm` is the reference."""
    rng = np.random.default_rng(0)
    shapes = {"large": (130, 130), "small": (3,), "none": (), "half": (5, 2)}
    tree = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    tree["half"] = tree["half"].astype(jnp.bfloat16)
    monkeypatch.setattr(clients.devices, "platform", lambda: "tpu")
    for most in (1.0, 1e3):
        rule = clients._clip_by_global_norm(most)
        found, _ = rule.update(tree, rule.init(tree))
        expected, _ = optax.clip_by_global_norm(most).update(tree, optax.EmptyState())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-2)
        np.testing.assert_allclose(found["large"], expected["large"], rtol=1e-5)
