"""Parameters without some of their variables: what is trained, when not all of them are.

The tree stays as it is, with `optax.MaskedNode` (which has no leaves) in place of what is left out:
paths do not change, and clipping, sums, noise and optimisers see trained variables only.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def keep(tree: Any, kept: Sequence[bool] | None) -> Any:
    """The tree with `optax.MaskedNode` in place of the variables that are not kept.

    Args:
      tree: any pytree. kept: for each leaf in order; None for all.
    """
    if kept is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        [x if yes else optax.MaskedNode() for x, yes in zip(leaves, kept, strict=True)]
    )


def merge(part: Any, tree: Any, kept: Sequence[bool] | None) -> Any:
    """The tree with the leaves of `part`, made by `keep`, in place of its own."""
    if kept is None:
        return part
    leaves, treedef = jax.tree.flatten(tree)
    new = iter(jax.tree.leaves(part))
    return treedef.unflatten([next(new) if yes else x for x, yes in zip(leaves, kept, strict=True)])


def transform_part(
    transform: optax.GradientTransformation, kept: Sequence[bool] | None
) -> optax.GradientTransformation:
    """A transformation of updates to some of the variables; the rest get updates of zero.

    Args:
      transform: sees kept variables only.
      kept: see `keep`.

    Returns:
      A transformation whose `update` takes what `keep` made and returns the whole tree.
    """
    if kept is None:
        return transform
    transform = optax.with_extra_args_support(transform)

    def update(updates, state, params, **extra):
        updates, state = transform.update(updates, state, keep(params, kept), **extra)
        return merge(updates, jax.tree.map(jnp.zeros_like, params), kept), state

    return optax.GradientTransformationExtraArgs(lambda p: transform.init(keep(p, kept)), update)
