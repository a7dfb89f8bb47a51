"""Parameters without some of their variables: what is trained, when not all of them are.

The tree stays as it is, with `optax.MaskedNode` (which has no leaves) in place of what is left out:
paths do not change, and clipping, sums, noise and optimisers see trained variables only.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError


def matches(params: Any, patterns: Sequence[str], setting: str) -> list[bool]:
    """For each variable in order, whether its path matches one of the patterns.

    Args:
      params: any pytree of arrays or of their shapes.
      patterns: regular expressions, searched for in paths such as
        "block_0/attention/qkv/kernel".
      setting: what the patterns are called, for messages.

    Raises:
      UserError: for a bad pattern, or one that matches no path.
    """
    check_patterns(patterns, setting)
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"{setting}: {pattern!r} matches none of {names}")
    return [any(re.search(p, name) for p in patterns) for name in names]


def check_patterns(patterns: Sequence[str], setting: str) -> None:
    """Raises UserError for one that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{setting}: {pattern!r}: {error}") from error


def select(tree: Any, kept: Sequence[bool] | None) -> Any:
    """The tree with `optax.MaskedNode` in place of the variables that are not kept.

    Args:
      tree: any pytree. kept: for each leaf in order; None for all.
    """
    if kept is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [x if yes else optax.MaskedNode() for x, yes in zip(leaves, kept, strict=True)]
    )


def merge(part: Any, tree: Any, kept: Sequence[bool] | None) -> Any:
    """The tree with the leaves of `part`, made by `select`, in place of its own."""
    if kept is None:
        return part
    leaves, treedef = jax.tree.flatten(tree)
    new = iter(jax.tree.leaves(part))
    return jax.tree.unflatten(
        treedef, [next(new) if yes else x for x, yes in zip(leaves, kept, strict=True)]
    )


def transform_part(
    transform: optax.GradientTransformation, kept: Sequence[bool] | None
) -> optax.GradientTransformation:
    """A transformation of updates to some of the variables; the rest get updates of zero.

    Args:
      transform: sees kept variables only.
      kept: see `select`.

    Returns:
      A transformation whose `update` takes what `select` made and returns the whole tree.
    """
    if kept is None:
        return transform
    transform = optax.with_extra_args_support(transform)

    def update(updates, state, params, **extra):
        updates, state = transform.update(updates, state, select(params, kept), **extra)
        return merge(updates, jax.tree.map(jnp.zeros_like, params), kept), state

    return optax.GradientTransformationExtraArgs(lambda p: transform.init(select(p, kept)), update)
