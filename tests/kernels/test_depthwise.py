import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels.depthwise import depthwise_convolution

pytestmark = pytest.mark.usefixtures("optimized")

# Compiling is what takes the time here.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def jit(function):
    return jax.jit(function, compiler_options=COMPILER)


def with_derivatives(x, kernel, gradient):
    out, pull = jax.vjp(depthwise_convolution, x, kernel)
    return out, pull(gradient)


@pytest.mark.parametrize(("frames", "width"), [(9, 1), (9, 4), (9, 5), (3, 8)])
def test_depthwise_convolution_equals_a_plain_loop(frames, width):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, frames, 3)).astype(np.float32)
    kernel = rng.normal(size=(width, 3)).astype(np.float32)
    gradient = rng.normal(size=x.shape).astype(np.float32)
    out, derivatives = jit(with_derivatives)(x, kernel, gradient)
    expected, to_x, to_kernel = np.zeros(x.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    for i in range(frames):
        for j in range(width):
            at = i + j - (width - 1) // 2
            if 0 <= at < frames:
                expected[:, i] += x[:, at] * kernel[j]
                to_x[:, at] += gradient[:, i] * kernel[j]
                to_kernel[j] += np.sum(gradient[:, i] * x[:, at], axis=0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(derivatives, (to_x, to_kernel), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_depthwise_convolution_of_many_clients_has_no_grouped_convolution():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(3, *shape)) for shape in [(2, 9, 4), (5, 4), (2, 9, 4)]]
    arrays = [a.astype(np.float32) for a in arrays]
    mapped = jit(jax.vmap(with_derivatives))
    together = mapped(*arrays)
    for i, client in enumerate(zip(*arrays, strict=True)):
        ours = jax.tree.map(lambda a: a[i], together)  # noqa: B023
        alone = jit(with_derivatives)(*client)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, alone
        )
    assert "convolution" not in mapped.lower(*arrays).as_text("hlo")


def test_depthwise_convolution_in_half_precision_sums_in_single():
    x = np.random.default_rng(0).normal(size=(1, 40, 2)).astype(jnp.bfloat16)
    kernel = np.full((32, 2), 0.25, np.float32)
    convolve = jit(depthwise_convolution)
    out, exact = convolve(x, kernel), convolve(x.astype(np.float32), kernel)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
