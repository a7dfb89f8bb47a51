"""The Transformer as accelerators compute it, interpreted on the CPU, is everybody's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr import stacks
from fedasr.kernels import (
    attention_accelerated,
    block_accelerated,
    devices,
    frontend_accelerated,
    norm_accelerated,
)
from fedasr.models import encoder_blocks
from fedasr.models.recogniser import make_recogniser

SIZES = {
    "vocab": 6, "features": 8, "dim": 32, "heads": 2, "mlp": 32, "blocks": 3, "dropout": 0.2,
    "layer_drop": 0.4, "generator": "hashed",
}  # fmt: skip


def batch():
    rng = np.random.default_rng(0)
    return {
        "features": jnp.asarray(rng.standard_normal((3, 40, 8)), jnp.float32),
        "features_length": jnp.asarray([40, 33, 20], jnp.int32),
        "labels": jnp.asarray(rng.integers(1, 6, (3, 4)), jnp.int32),
        "labels_length": jnp.asarray([4, 3, 2], jnp.int32),
        "mask": jnp.asarray([True, True, True]),
    }


@pytest.fixture
def on(monkeypatch):
    """on(kind): from here on programs are traced as if for such a device; CTC excepted."""
    for kernels in (attention_accelerated, block_accelerated, frontend_accelerated):
        monkeypatch.setattr(kernels, "Plan", functools.partial(kernels.Plan, interpret=True))
    for name in ("add_norm", "norm"):
        real = getattr(norm_accelerated, name)
        monkeypatch.setattr(
            norm_accelerated, name, lambda dtype, _, *args, real=real: real(dtype, True, *args)
        )
    return lambda kind: [
        monkeypatch.setattr(f"fedasr.models.{name}.devices", Elsewhere(kind))
        for name in ("layers", "transformer", "encoder_blocks")
    ]


class Elsewhere:
    """In place of `fedasr.kernels.devices`."""

    def __init__(self, kind):
        self.platform = lambda: kind
        self.for_layers = lambda: kind if kind == "tpu" else ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tpu", "gpu", "tpu whole"])
@pytest.mark.parametrize(
    "options",
    [
        {"scan_blocks": True},
        {"branch_dropout": False},
        {"front_end": "same", "init": "lecun", "kernel": 5, "stride": 4},
    ],
    ids=["stacked", "one by one", "same"],
)
def test_losses_and_gradients_are_the_same(kind, options, on, monkeypatch):
    """With dropout of weights, units and blocks: what is drawn is the same."""
    kind, whole = kind[:3], "whole" in kind
    if not whole:  # as where a block's matrices are too large for one kernel
        for kernels in (block_accelerated, frontend_accelerated):
            monkeypatch.setattr(kernels, "fits", lambda *_: False)
    recogniser = make_recogniser("transformer", SIZES | options)
    params = recogniser.init(jax.random.key(0))
    gradient = jax.value_and_grad(lambda *args: recogniser.loss(*args)[0])
    args = batch(), jax.random.key(5)
    value, expected = jax.jit(gradient)(params, *args)
    on(kind)
    stacked = "scan_blocks" in options
    given = stacks.stack(params) if stacked else params

    def anew(*args):  # JAX remembers what it traced before
        return gradient(*args)

    text = str(jax.make_jaxpr(anew)(given, *args))
    assert ("block_forwards" in text) == whole and ("attention_forwards" in text) != whole
    assert ("front_end_forwards" in text) == ("front_end_backwards" in text) == whole
    assert ("norm_forwards" in text) == (kind == "gpu")
    found, slopes = jax.jit(anew)(given, *args)
    slopes = stacks.unstack(slopes) if stacked else slopes
    np.testing.assert_allclose(found, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max() + 1e-3)),
        slopes,
        expected,
    )


def test_front_ends_that_have_no_kernel(on):
    """Layers of a client's own before it, or a stream of another precision: its operations."""
    narrow, key = {"dtype": "bfloat16"}, jax.random.key(0)
    ways = [({}, True), (narrow, True), (narrow | {"stream_dtype": "float32"}, False)]
    ways += [({"input_layer": True}, False), ({"dtype": "float16"}, False)]
    made = [make_recogniser("transformer", SIZES | options) for options, _ in ways]
    params = [jax.eval_shape(recogniser.init, key) for recogniser in made]
    on("tpu")
    for (options, there), recogniser, given in zip(ways, made, params, strict=True):
        text = str(jax.make_jaxpr(recogniser.loss)(given, batch(), key))
        assert ("front_end_forwards" in text) == there, options


def test_here_nothing_is():
    assert devices.platform() == ""
    recogniser = make_recogniser("transformer", SIZES)
    params = jax.eval_shape(recogniser.init, jax.random.key(0))
    assert "pallas" not in str(jax.make_jaxpr(recogniser.loss)(params, batch(), jax.random.key(0)))


def test_stacked_blocks_are_the_same_blocks():
    """On any device: losses take parameters either way."""
    recogniser = make_recogniser("transformer", SIZES | {"scan_blocks": True, "blocks": 11})
    params = recogniser.init(jax.random.key(0))
    loss = jax.jit(lambda params: recogniser.loss(params, batch(), jax.random.key(1))[0])
    assert float(loss(params)) == float(loss(stacks.stack(params)))


def test_several_blocks_in_a_turn_are_the_same_blocks():
    recogniser = make_recogniser("transformer", SIZES | {"scan_blocks": True, "blocks": 4})
    params = recogniser.init(jax.random.key(0))

    def loss(params):
        return recogniser.loss(params, batch(), jax.random.key(1))[0]

    one = jax.jit(jax.grad(loss))(params)
    with encoder_blocks.per_turn(2):
        lowered = jax.jit(jax.grad(lambda params: loss(params))).lower(params)
    for a, b in zip(*map(jax.tree.leaves, (one, lowered.compile()(params))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert len(lowered.as_text()) > 1.2 * len(jax.jit(jax.grad(loss)).lower(params).as_text())
