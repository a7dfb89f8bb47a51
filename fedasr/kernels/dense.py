"""A product with a matrix that everything shares, and its derivative as a product over rows."""

import jax
import jax.numpy as jnp

from fedasr.kernels import narrow
from fedasr.kernels.low_rank import LowRank, plain


def product(x: jax.Array, kernel: jax.Array | LowRank) -> jax.Array:
    """x @ kernel for a matrix that all of x shares: [..., f] and [f, g] -> [..., g].

    The derivative by the kernel is written as a product over rows. JAX's own is the transpose of a
    product, for which XLA copies an operand on CPUs: it took 1.9 times as long, a whole training
    step 8% longer.

    A bfloat16 matrix is widened for float32 x (`fedasr.kernels.narrow`). By a `LowRank` it is the
    product by its base and, by way of the rank, that by its factors.
    """
    if isinstance(kernel, LowRank):
        low = product(x, kernel.down)
        return product(x, kernel.base) + kernel.scale * product(low, kernel.up)
    if kernel.dtype == jnp.bfloat16 and x.dtype == jnp.float32:
        return narrow.product(x, kernel)
    return _product(x, kernel)


def reference(x: jax.Array, kernel: jax.Array | LowRank) -> jax.Array:
    """What `product` computes."""
    return narrow.reference(x, plain(kernel))


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def by_kernel(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The derivative of `product` by its kernel: [..., f] and [..., g] -> [f, g]."""
    rows, by_rows = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
    return jax.lax.dot_general(rows, by_rows, (((0,), (0,)), ((), ())))


def by_input(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """The derivative of `product` by its input: [..., g] and [f, g] -> [..., f]."""
    return jax.lax.dot_general(gradient, kernel, (((gradient.ndim - 1,), (1,)), ((), ())))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel), (x, kernel)


def _backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    to_x = by_input(gradient, kernel)
    return to_x.astype(x.dtype), by_kernel(x, gradient).astype(kernel.dtype)


_product.defvjp(_forward, _backward)
