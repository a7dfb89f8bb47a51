"""The gradient of every model's loss by its input, which studies of leakage start from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.models.pretrained.registry import FAMILIES
from fedasr.models.recogniser import make_recogniser, model_configs

ENCODER = dict(vocab=6, features=8, dim=8, blocks=1, heads=2, mlp=8, dropout=0.1)
RNNT = dict(objective="rnnt", joint_dim=8, prediction_dim=8, ctc_weight=0.3)
MODELS = {
    "transformer": ("transformer", ENCODER),
    "transformer, input layer": ("transformer", ENCODER | dict(input_layer=True)),
    "transformer, checkpoints": ("transformer", ENCODER | dict(remat="block")),
    "transformer, fused": ("transformer", ENCODER | dict(attention="fused", norm="post")),
    "transformer, transducer": ("transformer", ENCODER | RNNT),
    "conformer": ("conformer", ENCODER),
    "conformer, checkpoints": ("conformer", ENCODER | dict(remat="block")),
    "recurrent": ("recurrent", dict(vocab=6, features=8, units=6, bidirectional=True)),
}
REST = {
    "features_length": np.int32([20, 13]),
    "labels": np.int32([[1, 2, 2], [3, 0, 0]]),
    "labels_length": np.int32([2, 1]),
    "mask": np.array([True, True]),
}
KEY = jax.random.key(3)


def features():
    return np.random.default_rng(0).normal(size=(2, 20, 8)).astype(np.float32)


def make_loss(name, augment=None):
    """(params, features) -> loss, and random parameters."""
    recogniser = make_recogniser(*MODELS[name], augment)
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(rng.uniform(-0.6, 0.6, x.shape)), shapes)
    return lambda p, x: recogniser.loss(p, {"features": x, **REST}, KEY)[0], params


def assert_slopes(function, x, gradient, step, tolerance):
    """The gradient gives the slopes of the function, along itself and along a random direction."""
    largest = float(np.linalg.norm(gradient))
    assert largest > 1e-3
    directions = gradient / largest, np.random.default_rng(2).normal(size=x.shape) / x.size**0.5
    for direction in directions:
        high, low = (float(function(x + np.float32(s * direction))) for s in (step, -step))
        expected = float(np.sum(np.float64(gradient) * direction))
        assert (high - low) / (2 * step) == pytest.approx(expected, abs=tolerance * largest)


def test_every_model_is_tried():
    """Of those that hear features: others hear samples."""
    assert {name for name, _ in MODELS.values()} == set(model_configs()) - set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_input_gradients_are_slopes_of_the_loss(name):
    loss, params = make_loss(name)
    gradient = jax.jit(jax.grad(loss, 1))(params, features())
    # Padding has no part in it.
    assert not np.asarray(gradient)[1, 13:].any() and np.abs(gradient).max() > 0
    assert_slopes(jax.jit(functools.partial(loss, params)), features(), gradient, 0.005, 0.02)


@pytest.mark.slow
def test_both_gradients_at_once_under_transformations():
    """By parameters and features: mapped, in a loop, and without a trace; also with masks."""
    loss, params = make_loss("transformer", SpecAugmentConfig())
    both = jax.value_and_grad(loss, (0, 1))
    x = np.stack([features(), features()[:, ::-1]])
    expected = [
        (jax.jit(jax.grad(loss))(params, a), jax.jit(jax.grad(loss, 1))(params, a)) for a in x
    ]
    expected = jax.tree.map(lambda *a: np.stack(a), *expected)
    mapped = jax.jit(jax.vmap(both, (None, 0)))(params, x)[1]
    looped = jax.jit(lambda p, x: jax.lax.map(lambda a: both(p, a), x))(params, x)[1]

    def of_sum(params, x):
        return jnp.sum(jax.vmap(jax.jit(loss), (None, 0))(params, x))

    outside = jax.jit(jax.grad(of_sum, 1))(params, x)
    for found in (mapped, looped):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), found, expected)
    np.testing.assert_allclose(outside, expected[1], atol=1e-4)


@pytest.mark.slow
def test_accelerators_have_the_same_gradients(monkeypatch):
    """What is compiled for other platforms, run here."""
    loss, params = make_loss("transformer")

    def gradients():
        by_both = jax.jit(lambda p, x: jax.grad(loss, (0, 1))(p, x))(params, features())
        return by_both, jax.jit(lambda p, x: jax.grad(loss)(p, x))(params, features())

    expected = gradients()
    calls = []

    def other(*args, cpu, default):
        calls.append(default)
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", other)
    found = gradients()
    assert calls
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[0][0], found[1]
    )


@pytest.mark.slow
def test_gradient_inversion_finds_a_way():
    """The slope, by the input, of the size of the parameters' gradient: what an attacker follows.

    The inner gradient is the one of training, in which nobody asks for the features'.
    """
    loss, params = make_loss("transformer")

    def size(x):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(params, x)))

    gradient = jax.jit(jax.grad(size))(features())
    assert_slopes(jax.jit(size), features(), gradient, 0.01, 0.03)
