"""Functions that clients side by side are given together."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def one_batch(function: Any) -> Any:
    """`function`, whose arguments and results are [b, ...], with clients under a vmap as one batch.

    A kernel is then launched once for all of them, with clients * b rows.
    """

    @custom_vmap
    def together(*args: jax.Array) -> Any:
        return function(*args)

    @together.def_vmap
    def _(size: int, batched: Any, *args: jax.Array) -> tuple[Any, Any]:
        args = tuple(
            x if there else jnp.broadcast_to(x, (size, *x.shape))
            for x, there in zip(args, batched, strict=True)
        )
        flat = together(*(x.reshape(-1, *x.shape[2:]) for x in args))
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), flat)
        return split, jax.tree.map(lambda _: True, split)

    return together


def by_client(function: Any, shared: int = 0) -> Any:
    """`function`, whose arguments and results are [clients, ...], of clients under a vmap or one.

    Arrays of one client have an axis of 1 before their own, and so have those of the last `shared`
    arguments that are the same for all clients: they are not repeated.
    """

    @custom_vmap
    def one(*args: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[0], function(*(x[None] for x in args)))

    @one.def_vmap
    def _(size: int, batched: Any, *args: jax.Array) -> tuple[Any, Any]:
        own = len(args) - shared
        args = tuple(
            x if there else jnp.broadcast_to(x, (size if i < own else 1, *x.shape))
            for i, (x, there) in enumerate(zip(args, batched, strict=True))
        )
        found = function(*args)
        return found, jax.tree.map(lambda _: True, found)

    return one
