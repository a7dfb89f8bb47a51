import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels.frontend import affine_product, patches, reference
from fedasr.models import layers


@pytest.mark.parametrize(
    ("frames", "width", "stride"), [(12, 7, 3), (13, 7, 3), (14, 4, 2), (5, 1, 2), (2, 7, 3)]
)
def test_patches_and_a_dense_layer_are_a_strided_convolution(frames, width, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, frames, 3))
    kernel = rng.normal(size=(width, 3, 4))
    out = np.asarray(patches(jnp.asarray(x, jnp.float32), width, stride))
    assert out.shape == (2, -(-frames // stride), width * 3)
    expected = np.zeros((2, out.shape[1], 4))
    for i in range(out.shape[1]):
        for w in range(width):
            at = i * stride + w - (width - 1) // 2
            if 0 <= at < frames:
                expected[:, i] += x[:, at] @ kernel[w]
    np.testing.assert_allclose(out @ kernel.reshape(-1, 4), expected, rtol=1e-4, atol=1e-5)


def test_patches_of_longer_padding_begin_alike():
    x = np.random.default_rng(0).normal(size=(1, 8, 2)).astype(np.float32)
    short = patches(jnp.asarray(x), 7, 3)
    long = patches(jnp.pad(x, ((0, 0), (0, 9), (0, 0))), 7, 3)
    np.testing.assert_array_equal(short, long[:, : short.shape[1]])


@pytest.mark.parametrize("scale", [1.0, -0.7, 0.11, 0.05, 0.0])
@pytest.mark.parametrize(("frames", "width", "stride"), [(13, 7, 3), (4, 3, 3), (6, 4, 2)])
def test_affine_product_has_the_derivatives_of_patches(scale, frames, width, stride):
    """Of scale and bias, too, also near a scale of zero, under a vmap and with padding."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(width * 5, 4)).astype(np.float32)
    weights = rng.normal(size=(2, -(-frames // stride), 4)).astype(np.float32)
    x = rng.normal(size=(2, frames, 5)).astype(np.float32)
    lengths = np.int32([frames, frames - 2])
    module = layers.MaskedNorm()

    def loss(params, own):
        norm, kernel = params
        normed = module.apply({"params": norm}, x, lengths, method="affine")
        if own:
            y = affine_product(normed, kernel, stride)
        else:
            y = reference(normed, kernel, stride)
        return jnp.sum(jnp.tanh(y) * weights)

    norms = {"scale": jnp.float32([scale, 0.6]), "bias": jnp.float32([0.3, -0.2])}
    kernels = jnp.stack([kernel, kernel[::-1]])
    for i in (0, 1):
        one = (jax.tree.map(lambda a, i=i: a[i], norms), kernels[i])
        found, expected = (jax.value_and_grad(loss)(one, own) for own in (True, False))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
        )
    found, expected = (
        jax.vmap(jax.grad(loss), (0, None))((norms, kernels), own) for own in (True, False)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
