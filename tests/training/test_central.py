import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.batching import PooledBatcher, make_buckets
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.streams import Stream, seed_key
from fedasr.training.builders.optimizers import central_optimizer, central_schedule, check
from fedasr.training.central import CentralTraining
from fedasr.training.config import Config, default_config
from fedasr.training.sections import Central

PARAMS = {"w": np.float32([0.5, -1.0])}
BATCH, SEED = 3, 9  # three does not divide among two devices


def noisy_squares(params, batch, key):
    """Squared error of the frames' mean, with label noise of each slot's own key."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(batch["mask"])))
    noise = jax.vmap(jax.random.normal)(keys)
    mean = batch["x"].sum(1) / jnp.maximum(batch["x_length"], 1)[:, None]
    error = mean @ params["w"] - batch["y"] + 0.1 * noise
    count = jnp.maximum(batch["mask"].sum(), 1)
    return jnp.sum(jnp.where(batch["mask"], error**2, 0.0)) / count, {}


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    users = {
        f"u{i}": [
            {
                "x": rng.normal(size=(length, 2)).astype(np.float32),
                "y": np.float32(rng.normal()),
                "unused": np.zeros(1),
            }
            for length in rng.integers(1, 12, size)
        ]
        for i, size in enumerate([3, 1, 4])
    }
    return InMemoryCorpus(users, ragged=("x",))


def training(corpus, devices, per_report=3, buckets=2, seed=SEED):
    return CentralTraining(
        corpus,
        noisy_squares,
        optax.adam(0.1),
        BATCH,
        seed=seed,
        buckets=make_buckets([corpus], buckets, {"x": 4}),
        steps_per_report=per_report,
        devices=jax.devices()[:devices],
        select=("x", "y"),
    )


@pytest.fixture(scope="module")
def single(corpus):
    return training(corpus, 1)


def by_hand(corpus, steps):
    buckets = make_buckets([corpus], 2, {"x": 4})
    root = seed_key(SEED, Stream.CENTRAL)
    optimizer = optax.adam(0.1)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, losses = optimizer.init(params), []
    batcher = PooledBatcher(corpus, buckets, SEED, batch_size=BATCH, select=("x", "y"))
    gradient = jax.jit(jax.value_and_grad(noisy_squares, has_aux=True))
    for step in range(steps):
        batch = batcher.batch(step)
        (loss, _), grads = gradient(params, batch, jax.random.fold_in(root, step))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return params, losses


@pytest.mark.parametrize("devices", [1, 2])
def test_training_equals_a_plain_loop(corpus, single, devices):
    params, losses = by_hand(corpus, 7)
    central = single if devices == 1 else training(corpus, 2)
    reports = list(central.run(central.init(PARAMS), 7))
    assert [done for _, done, _ in reports] == [3, 6, 7]
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose([loss for _, _, loss in reports], means, rtol=1e-5)
    state = reports[-1][0]
    assert int(state.round) == 7
    np.testing.assert_allclose(state.params["w"], params["w"], rtol=1e-5)


def test_a_resumed_run_is_bit_identical(corpus, single):
    *_, (whole, _, _) = single.run(single.init(PARAMS), 7)
    *_, (half, done, _) = single.run(single.init(PARAMS), 4)
    assert done == 4
    saved = jax.tree.map(np.array, jax.device_get(half))
    fresh = training(corpus, 1)
    reports = list(fresh.run(fresh.transfer(saved), 3))
    assert [done for _, done, _ in reports] == [6, 7]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), reports[-1][0])


def test_it_learns(single):
    losses = [loss for _, _, loss in single.run(single.init(PARAMS), 300)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def rates(steps, **settings):
    schedule = central_schedule(Central(learning_rate=0.5, **settings))
    if isinstance(schedule, float):
        return [schedule] * len(steps)
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_schedules_are_constant_until_they_decay():
    """By hand: the published halving begins with the first step of the decay."""
    assert rates([0, 9], decay_start=4) == [0.5, 0.5]
    steps = [0, 39, 40, 49, 50, 59, 60]
    halved = rates(steps, decay_start=40, decay_steps=10)
    assert halved == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625])
    # As before: with no start of its own the decay begins after decay_steps.
    from_zero = rates([0, 9, 10, 19, 20], decay_steps=10)
    assert from_zero == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.125])
    assert rates([0, 9, 10, 19, 20], decay_start=10, decay_steps=10) == pytest.approx(from_zero)
    smooth = rates([0, 40, 45, 50, 60], decay_start=40, decay_steps=10, decay_smooth=True)
    assert smooth == pytest.approx([0.5, 0.5, 0.5 * 0.5**0.5, 0.25, 0.125])
    # As Keras' polynomial decay of power 1: the published decoder stops where a fifth is gone.
    linear = rates([0, 50, 90, 100, 120], decay_steps=100, decay_linear=True)
    assert linear == pytest.approx([0.5, 0.25, 0.05, 0, 0])
    late = rates([0, 10, 15, 25], decay_start=10, decay_steps=10, decay_linear=True)
    assert late == pytest.approx([0.5, 0.5, 0.25, 0])


@pytest.mark.parametrize("change", [{"decay_smooth": True, "decay_steps": 9}, {"decay_steps": 0}])
def test_a_linear_decay_needs_its_end(change):
    settings = dataclasses.replace(Central(), decay_linear=True, **change)
    with pytest.raises(UserError, match="decay_linear falls"):
        check(dataclasses.replace(Config.of(default_config().to_dict()), central=settings))


def test_central_optimisers_take_options():
    optimizer = central_optimizer(
        Central(optimizer="lars", options={"eps": 1.0}, learning_rate=1.0, grad_clip=100.0)
    )
    p, g = jnp.float32([3.0, 4.0]), jnp.float32([0.6, 0.8])
    update, _ = optimizer.update(g, optimizer.init(p), p)
    np.testing.assert_allclose(update, -0.001 * 5 / (1 + 1.0) * g, rtol=1e-6)


def test_another_seed_has_the_same_program_and_other_draws(corpus):
    """What is compiled for one seed is found in the cache by the next."""
    programs, losses = [], []
    for seed in (1, 2):
        made = training(corpus, 1, per_report=1, buckets=1, seed=seed)
        state, batch = made.init(PARAMS), made._batcher.batch(0)
        programs.append(made._step.lower(state, batch, made._root).as_text())
        losses.append([loss for *_, loss in made.run(state, 2)])
    assert programs[0] == programs[1] and losses[0] != losses[1]
