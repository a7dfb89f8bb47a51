"""Every kernel against its reference, values and all gradients, in float64 where it takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels import attention, ctc, dense, depthwise, frontend, gru, rnnt
from fedasr.kernels.checkpoint import checkpoint
from fedasr.kernels.low_rank import LowRank


def compare(found, expected, arguments, tolerance):
    """Values of both functions, and gradients by all float arguments of a weighted sum of them."""
    floats = [i for i, x in enumerate(arguments) if x is not None and x.dtype.kind == "f"]
    outer = np.random.default_rng(9).normal(size=np.shape(jax.eval_shape(found, *arguments)))

    def total(function):
        def of(*arguments):
            out = function(*arguments)
            return jnp.sum(out * outer.astype(out.dtype)), out

        return jax.value_and_grad(of, floats, has_aux=True)

    ours, theirs = (jax.jit(total(function))(*arguments) for function in (found, expected))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert np.abs(other).max() > 0 and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def test_low_rank():
    arguments = normal(2, 5, 7), normal(7, 4, seed=1), normal(7, 3, seed=2), normal(3, 4, seed=3)

    def through(function):
        return lambda x, *parts: function(x, LowRank(*parts, scale=0.7))

    compare(through(dense.product), through(dense.reference), arguments, 1e-12)
    x, base, down, up = arguments
    by_hand = x @ (base + 0.7 * down @ up)
    np.testing.assert_allclose(through(dense.product)(*arguments), by_hand, rtol=1e-12)
    # What knows arrays alone gets the sum.
    np.testing.assert_allclose(jnp.asarray(x) @ LowRank(base, down, up, 0.7), by_hand, rtol=1e-12)


def test_narrow():
    """Of a matrix that all share, and of one for each; also where one client's input is NaN."""
    kernel = jnp.asarray(normal(7, 4, seed=1), jnp.bfloat16)
    x = jnp.asarray(normal(3, 2, 5, 7), jnp.float32)

    def total(function):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1)))

    for own, axes in ((kernel, (0, None)), (jnp.stack([kernel, -kernel, 2 * kernel]), (0, 0))):
        ours, theirs = (
            jax.vmap(total(function), in_axes=axes)(x, own)
            for function in (dense.product, dense.reference)
        )
        for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=1e-2, atol=1e-5)
        broken = jax.vmap(dense.product, in_axes=axes)(x.at[0].set(jnp.nan), own)
        expected = jax.vmap(dense.reference, in_axes=axes)(x, own)
        assert np.isnan(broken[0]).all()
        np.testing.assert_allclose(broken[1:], expected[1:], rtol=1e-5, atol=1e-5)


def test_dense():
    compare(dense.product, dense.reference, (normal(2, 5, 7), normal(7, 4, seed=1)), 1e-12)


@pytest.mark.parametrize(("frames", "width"), [(9, 1), (9, 4), (9, 5), (3, 8)])
def test_depthwise(frames, width):
    arguments = normal(2, frames, 3), normal(width, 3, seed=1)
    compare(depthwise.depthwise_convolution, depthwise.reference, arguments, 1e-12)


@pytest.mark.parametrize("backwards", [False, True])
def test_gru(backwards):
    shapes = dict(input=(5, 12), bias=(12,), recurrent=(4, 12), recurrent_bias=(4,), initial=(4,))
    params = [normal(*shape, seed=i) for i, shape in enumerate(shapes.values())]
    lengths = np.int32([4, 6, 0])

    def with_params(function):
        def of(x, *params):
            return function(dict(zip(shapes, params, strict=True)), x, lengths, backwards)

        return of

    arguments = normal(3, 6, 5), *params
    compare(with_params(gru.gru), with_params(gru.reference), arguments, 1e-10)


@pytest.mark.parametrize("dropped", [False, True])
def test_attention(dropped):
    """With padding, an utterance that is nothing else, and the gradient of dropout's factors."""
    mask = np.arange(5) < np.array([[5], [3], [0]])
    kept = np.random.default_rng(0).choice([0.0, 1.6], (3, 2, 5, 5)) if dropped else None
    arguments = *normal(3, 3, 5, 2, 4), mask, kept
    compare(attention.attention, attention.reference, arguments, 1e-10)


@pytest.mark.parametrize("function", [attention.fused_attention, attention.long_attention])
def test_other_ways_of_attention(function, monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES", 4)
    mask = np.arange(10) < np.array([[10], [3]])

    def inside(function):
        return lambda *args: function(*args, mask) * mask[..., None, None]

    arguments = normal(3, 2, 10, 2, 4).astype(np.float32)
    compare(inside(function), inside(attention.reference), arguments, 1e-5)


@pytest.mark.parametrize("scale", [0.7, 0.05])
@pytest.mark.parametrize(("frames", "width", "stride"), [(13, 7, 3), (4, 3, 3), (6, 4, 2)])
def test_front_end(frames, width, stride, scale):
    """With the frames' gradient, and without: another way for the two scalars."""
    mask = (np.arange(frames) < np.array([[frames], [frames - 2]]))[..., None]
    normed = normal(2, frames, 5) * mask
    rest = np.float64(scale), np.float64(-0.3), normal(width * 5, 4, seed=1)

    def of(function):
        def product(normed, scale, bias, kernel):
            return function(frontend.Affine(normed, mask, scale, bias), kernel, stride)

        return product

    found, expected = of(frontend.affine_product), of(frontend.reference)
    compare(found, expected, (normed, *rest), 1e-10)
    compare(*(lambda *args, f=f: f(normed, *args) for f in (found, expected)), rest, 1e-10)


@pytest.mark.parametrize(("frames", "width", "stride"), [(12, 7, 3), (13, 4, 2), (2, 7, 3)])
def test_patches(frames, width, stride):
    def of(function):
        return lambda x: function(x, width, stride)

    both = of(frontend.patches), of(frontend.patches_reference)
    compare(*both, (normal(2, frames, 3),), 1e-12)


LENGTHS, LABELS = np.array([9, 7, 3, 0]), np.array([[1, 1, 2], [4, 2, 2], [1, 1, 1], [1, 2, 3]])
COUNTS = np.array([3, 1, 3, 2])  # the third would need five frames, the fourth has none


@pytest.mark.parametrize(("kernel", "shape"), [(ctc, (4, 9, 6)), (rnnt, (4, 9, 4, 6))])
def test_losses(kernel, shape):
    loss = kernel.ctc_loss if kernel is ctc else kernel.rnnt_loss

    def found(logits):  # in float32
        return loss(logits, LENGTHS, LABELS, COUNTS)[0].astype(jnp.float64)

    def expected(logits):
        return kernel.reference(logits, LENGTHS, LABELS, COUNTS)

    compare(found, expected, (2 * normal(*shape),), 2e-5)


def test_checkpoint():
    """All float arguments have their gradient, beside keys, truth values and None."""
    key, mask = jax.random.key(0), np.array([True, False, True])

    def block(params, x, scale, mask, key, nothing):
        assert nothing is None
        noise = jax.random.uniform(key, x.shape, x.dtype)
        return jnp.where(mask, jnp.tanh(params["w"] * x) * scale, noise)

    def of(function):
        return lambda w, x, scale: function({"w": w}, x, scale, mask, key, None)

    arguments = normal(3), normal(2, 3, seed=1), normal(2, 1, seed=2)
    compare(of(checkpoint(block)), of(block), arguments, 1e-12)
