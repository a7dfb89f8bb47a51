"""What the rules of clipping share: layers by name, norms that do not overflow, exact selection."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedasr import stacks
from fedasr.errors import UserError

Layers = Callable[[str], str] | None

# What is clipped is brought this far below its bound. XLA's float32 norm of four million elements
# errs by up to 2e-7 and rescaling rounds by 1e-7: the bound holds in spite of both, and the norm
# that is measured when clipping again is below the bound, so nothing changes the second time.
MARGIN = 2e-6
# Squares of magnitudes outside [2^-40, 2^40] could leave float32; they are scaled by 2^±80 first.
SAFE = 2.0**40
RESCALE = 2.0**80


class ClipState(NamedTuple):
    """What the last update looked like before it was clipped (all zeros after `init`).

    norms: float32 [H], L2 norm of each layer before clipping (saturates at the largest float32;
      zeros for a non-finite update).
    clipped: bool [H], whether the layer was scaled down; under a global clip all layers agree.
    finite: bool [], False when the update held a NaN or an infinity and was replaced by zeros.
    """

    norms: chex.Array
    clipped: chex.Array
    finite: chex.Array


class Grouping(NamedTuple):
    """Of a tree's leaves into layers."""

    names: tuple[str, ...]  # one per layer, in order of first appearance
    layer_of: tuple[int, ...]  # of each leaf
    sizes: tuple[int, ...]  # elements of each layer


def grouped(tree: Any, layers: Layers) -> Grouping:
    """The layers of a tree, of one with stacked blocks as if they were not.

    Raises:
      UserError: there are no arrays, or some are not of floats.
    """
    names: dict[str, int] = {}
    index: list[int] = []
    sizes: list[int] = []
    if stacks.is_stacked(tree):
        tree = stacks.unstack(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves:
        raise UserError("Clipping needs parameters: the tree has no arrays.")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"Only floating-point updates can be clipped; {where!r} is {dtype}.")
        name = where if layers is None else str(layers(where))
        layer = names.setdefault(name, len(names))
        if layer == len(sizes):
            sizes.append(0)
        index.append(layer)
        sizes[layer] += math.prod(jnp.shape(leaf))
    return Grouping(tuple(names), tuple(index), tuple(sizes))


class Norm(NamedTuple):
    """A norm as root * scale: float32 holds both parts of what may be too large or small for it."""

    root: chex.Array
    scale: chex.Array  # exactly 2^-80, 1 or 2^80
    finite: chex.Array

    def value(self) -> chex.Array:
        return jnp.minimum(self.root * self.scale, jnp.finfo(jnp.float32).max)


def factors_to(norm: Norm, length: Any) -> tuple[chex.Array, chex.Array]:
    """Two factors, applied one after the other, that bring what has `norm` to `length`.

    Their product could leave float32.
    """
    return 1 / norm.scale, length / jnp.where(norm.root > 0, norm.root, 1.0)


def _cast_toward_zero(x: chex.Array, dtype: Any) -> chex.Array:
    """Rounds float32 `x` to `dtype` so that no magnitude, and hence no norm, grows."""
    if dtype == jnp.float32:
        return x
    y = x.astype(dtype)
    grown = jnp.abs(y.astype(jnp.float32)) > jnp.abs(x)
    return jnp.where(grown, jnp.nextafter(y, jnp.zeros_like(y)), y)


def select(clipped: chex.Array, finite: chex.Array, small: chex.Array, x: chex.Array):
    """`small` (float32) where clipped, the untouched `x` elsewhere, zeros if not finite."""
    chosen = jnp.where(clipped, _cast_toward_zero(small, x.dtype), x)
    return jnp.where(finite, chosen, jnp.zeros_like(x))
