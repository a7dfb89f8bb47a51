"""A product with a matrix that is kept in half precision, and widened where it is used."""

import jax
import jax.numpy as jnp


def reference(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `product` computes."""
    return x @ kernel.astype(x.dtype)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel of a narrower kernel: [..., f] and [f, g] -> [..., g], in the dtype of x.

    Where training loops over steps, XLA would widen the matrices of all layers before the loop, for
    they do not change in it. Here each is widened once its input is there, and is let go again. It
    is one for all clients that are vmapped.
    """
    return _dot(x, _widened(x.ravel()[0], kernel), 0)


def _dot(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())))


def _widen(known: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel in the dtype of `known`, not before `known` is there.

    The condition holds for every number, NaN among them: no client's values reach another's.
    """
    always = (known != known) | (known <= jnp.inf)
    return jnp.where(always, kernel, jnp.zeros_like(kernel)).astype(known.dtype)


_widened = jax.custom_batching.custom_vmap(_widen)


@_widened.def_vmap
def _one_for_all(
    axis_size: int, in_batched: list[bool], known: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size
    if not in_batched[1]:  # any client's input will do
        return _widened(known[0] if in_batched[0] else known, kernel), False
    return jax.vmap(_widen, in_axes=(0 if in_batched[0] else None, 0))(known, kernel), True


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel), (x, kernel)


def _backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, by_rows = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
    by_kernel = jax.lax.dot_general(rows, by_rows, (((0,), (0,)), ((), ())))
    wide = _widened(gradient.ravel()[0], kernel)
    return _dot(gradient, wide, 1), by_kernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)
