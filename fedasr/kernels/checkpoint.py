"""Gradient checkpointing that no compiler undoes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def checkpoint(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Gradient checkpointing: the backward pass computes `function` again (arXiv 1604.06174).

    Only the arguments are kept, at the price of a second forward pass. That is what
    `jax.checkpoint` does, too, but XLA drops its barriers on CPUs, merges both passes and saves
    nothing. Here what is computed again depends on the incoming gradient, so that no compiler can
    do it earlier, or only once.

    Args:
      function: (params, x, *rest) -> array. params and rest: any pytrees. The function itself is
        the reference.

    Returns:
      The same function, with equal gradients up to the order of float operations.
    """

    @jax.custom_vjp
    def wrapped(params: Any, x: jax.Array, *rest: Any) -> jax.Array:
        return function(params, x, *rest)

    def forward(params: Any, x: jax.Array, *rest: Any) -> tuple[jax.Array, tuple]:
        # Else what parameters alone decide, such as their conversion to another dtype, may be
        # computed for all blocks beforehand.
        return function(after(x, params), x, *rest), (params, x, *rest)

    def backward(args: tuple, gradient: jax.Array) -> tuple:
        return jax.vjp(function, *after(gradient, args))[1](gradient)

    wrapped.defvjp(forward, backward)
    return wrapped


def after(known: jax.Array, tree: Any) -> Any:
    """The tree as it is, but so that nothing can be computed from it before `known` is there.

    Where the first element of `known` is not finite it is all zeros: for use where what is not
    finite comes out as not finite in any case.
    """
    first = known.ravel()[0]
    usual = first <= jnp.finfo(first.dtype).max
    return jax.tree.map(lambda a: jnp.where(usual, a, jnp.zeros_like(a)), tree)
