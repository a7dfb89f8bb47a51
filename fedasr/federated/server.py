"""The server: one optax chain turns the cohort's sum into new parameters.

    sum -> /expected cohort -> + Gaussian noise -> LAMB, Adam, SGD, ... -> parameters

The first two belong to `fedasr.privacy.mechanism.Mechanism.server_transform`; the last is any
optax optimiser. The chain's state, noise counter included, is part of a checkpoint.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedasr import stacks
from fedasr.errors import UserError
from fedasr.federated.client import Params
from fedasr.federated.keras_adam import keras_adam

SERVER_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "keras_adam": keras_adam,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "sgd": optax.sgd,
    "yogi": optax.yogi,
}


class ServerState(NamedTuple):
    """params: the model. opt_state: the chain's. round: int32, rounds done.

    root: uint32 [8], of everything random in the run (see `fedasr.streams`); () without a run.
    """

    params: Params
    opt_state: optax.OptState
    round: jax.Array
    root: Any = ()


def constant_then_exponential(
    value: float, decay_start: int, decay_rounds: int, decay_rate: float = 0.6
) -> optax.Schedule:
    """`value` until round t0 = `decay_start`, then value * decay_rate^((t - t0) / decay_rounds).

    The server's schedule in arXiv 2310.00098, whose decay rate is 0.6.
    """

    def schedule(count):
        late = jnp.maximum(count - decay_start, 0)
        return value * decay_rate ** (late / decay_rounds)

    return schedule


class ByBlock(optax.GradientTransformationExtraArgs):
    """A transformation that also takes trees with stacked blocks: see `by_block`."""


def by_block(optimizer: optax.GradientTransformation) -> ByBlock:
    """An optimiser that treats stacked blocks (`fedasr.stacks`) one by one, by the same rule.

    Args:
      optimizer: handles every array by itself, without randomness. What it keeps for all of them,
        such as a count, must not depend on what any of them holds.

    Returns:
      The same optimiser, which also takes trees whose blocks are stacked, and then has a state
      whose blocks are. Its `update` raises ValueError for these if `optimizer` looks at several
      arrays at once.
    """
    every = optax.with_extra_args_support(optimizer)

    def mapped(function: Callable[..., Any], given: Any, like: Any) -> Any:
        """function(given) for each block; `like` is what it returns, stacked or of one block."""
        leaves, treedef = jax.tree.flatten(given)

        def of_block(leaves: list[Any]) -> list[Any]:
            return jax.tree.leaves(function(jax.tree.unflatten(treedef, leaves)))

        axes, out_axes = stacks.axes(given), stacks.axes(like)
        found = jax.vmap(of_block, in_axes=(axes,), out_axes=out_axes)(leaves)
        return jax.tree.unflatten(jax.tree.structure(like), found)

    def init(params: Any) -> Any:
        if not stacks.is_stacked(params):
            return every.init(params)
        return mapped(every.init, params, jax.eval_shape(every.init, stacks.one_of(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not stacks.is_stacked(updates):
            return every.update(updates, state, params, **extra)
        done: tuple[Any, Any] = mapped(
            lambda given: every.update(*given, **extra), (updates, state, params), (updates, state)
        )
        return done

    return ByBlock(init, update)


def make_optimizer(name: str, learning_rate: float | optax.Schedule, **options: float) -> ByBlock:
    """An optimiser by name (see `SERVER_OPTIMIZERS`), with its own options: optax's, mostly.

    Raises:
      UserError: for an unknown name or option.
    """
    if name not in SERVER_OPTIMIZERS:
        raise UserError(f"unknown optimizer {name!r}: choose one of {sorted(SERVER_OPTIMIZERS)}")
    try:
        return by_block(SERVER_OPTIMIZERS[name](learning_rate, **options))
    except TypeError as error:
        raise UserError(f"optimizer {name!r} does not take these options: {error}") from error


def init_server(params: Params, chain: optax.GradientTransformation, root: Any = ()) -> ServerState:
    """The state before the first round."""
    return ServerState(params, chain.init(params), jnp.int32(0), root)


def server_step(
    state: ServerState, total: Params, chain: optax.GradientTransformation, **extra: jax.Array
) -> ServerState:
    """One server update from the cohort's sum of client deltas (old minus new, so a gradient).

    `extra` are extra arguments of the chain: none, or what adaptive clipping needs of the round.
    """
    updates, opt_state = chain.update(total, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    return ServerState(params, opt_state, state.round + 1, state.root)
