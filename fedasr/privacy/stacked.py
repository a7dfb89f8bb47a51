"""The rules of `clipping` for updates whose blocks are stacked (`fedasr.stacks`).

What holds there holds here, layer by layer of the tree before stacking: its names, order, bounds
and norms. Norms are vectors over layers, and each array is read once for them: sums of squares of
all three scales at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr import stacks
from fedasr.privacy import norms as parts


class _Layers(NamedTuple):
    """layer_of: of each leaf, the layer or (stacked) the layers [blocks]. total: of layers."""

    layer_of: list[np.ndarray]
    total: int

    def combine(self, found: list[jax.Array], largest: bool) -> jax.Array:
        """From a number for each part of each leaf to one for each layer [count]."""
        every = jnp.concatenate([jnp.atleast_1d(x) for x in found])
        layers = np.concatenate([np.atleast_1d(x) for x in self.layer_of])
        if len(layers) == self.total:  # each its own
            return every[np.argsort(layers)]
        of_segments = jax.ops.segment_max if largest else jax.ops.segment_sum
        return of_segments(every, layers, self.total)

    def spread(self, of_layers: jax.Array, leaf: jax.Array, number: int) -> jax.Array:
        """A leaf's layers' numbers, so that they multiply it."""
        found = of_layers[self.layer_of[number]]
        return found.reshape(found.shape + (1,) * (leaf.ndim - found.ndim))


def _layers(updates: Any, layers: parts.Layers) -> _Layers:
    before = stacks.unstack(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), updates))
    grouping = parts.grouped(before, layers)
    numbered = jax.tree.unflatten(
        jax.tree.structure(before), [np.asarray(i) for i in grouping.layer_of]
    )
    return _Layers(jax.tree.leaves(stacks.stack(numbered)), len(grouping.names))


def _norms(leaves: list[jax.Array], layers: _Layers) -> parts.Norm:
    """Of all layers, [layers]: see `clipping._layer_norm`."""
    peaks, squares = [], []
    scales = (1 / parts.RESCALE, 1.0, parts.RESCALE)
    for leaf, layer in zip(leaves, layers.layer_of, strict=True):
        wide = leaf.astype(jnp.float32)
        axes = tuple(range(layer.ndim, leaf.ndim))
        peaks.append(jnp.max(jnp.abs(wide), axis=axes, initial=0.0))
        sums = [jnp.sum(jnp.square(wide * jnp.float32(1 / x)), axis=axes) for x in scales]
        squares.append(sums)
    peak = layers.combine(peaks, largest=True)
    # A norm that is not finite is so by its peak; a scale that fits some layers does not others.
    small, usual, large = (
        layers.combine([sums[i] for sums in squares], largest=False) for i in range(3)
    )
    long, short = peak > parts.SAFE, peak < 1 / parts.SAFE
    scale = jnp.where(long, scales[2], jnp.where(short, scales[0], scales[1]))
    square = jnp.where(long, large, jnp.where(short, small, usual))
    return parts.Norm(jnp.sqrt(square), scale, jnp.isfinite(peak))


def _joint(norms: parts.Norm) -> parts.Norm:
    scale = norms.scale.max()
    root = jnp.sqrt(jnp.sum(jnp.square(norms.root * (norms.scale / scale))))
    return parts.Norm(root, scale, norms.finite.all())


def _clipped(
    updates: Any,
    layers: _Layers,
    norms: parts.Norm,
    chosen: jax.Array,
    factors: tuple[jax.Array, jax.Array],
) -> tuple[Any, parts.ClipState]:
    """Scales the layers that are `chosen` by their factors."""
    finite = norms.finite.all()
    state = parts.ClipState(jnp.where(finite, norms.value(), 0.0), chosen & finite, finite)
    chosen, factors, finite = jax.lax.optimization_barrier((chosen, factors, finite))
    leaves, treedef = jax.tree.flatten(updates)
    out = []
    for i, leaf in enumerate(leaves):
        first, second, of_chosen = (layers.spread(x, leaf, i) for x in (*factors, chosen))
        small = leaf.astype(jnp.float32) * first * second
        out.append(parts.select(of_chosen, finite, small, leaf))
    return jax.tree.unflatten(treedef, out), state


def clip_layers(
    updates: Any, bounds: np.ndarray, clip_norm: float, layers: parts.Layers, normalise: bool
) -> tuple[Any, parts.ClipState]:
    """See `clipping.clip_layers`; bounds: float32 [layers]."""
    found = _layers(updates, layers)
    norms = _norms(jax.tree.leaves(updates), found)
    chosen = (norms.value() > bounds) | (bounds == 0)
    if normalise:
        chosen = jnp.full(found.total, _joint(norms).value() > np.float32(clip_norm))
    factors = parts.factors_to(norms, bounds * np.float32(1 - parts.MARGIN))
    return _clipped(updates, found, norms, chosen, factors)


def clip_all(updates: Any, clip_norm: float, layers: parts.Layers) -> tuple[Any, parts.ClipState]:
    """See `clipping.clip_all`."""
    found = _layers(updates, layers)
    norms = _norms(jax.tree.leaves(updates), found)
    norm = _joint(norms)
    factors = parts.factors_to(norm, np.float32(clip_norm * (1 - parts.MARGIN)))
    every = jnp.full(found.total, norm.value() > np.float32(clip_norm))
    first, second = (jnp.full(found.total, x) for x in factors)
    return _clipped(updates, found, norms, every, (first, second))


def guard_finite(updates: Any, layers: parts.Layers) -> tuple[Any, parts.ClipState]:
    """See `clipping.guard_finite`."""
    found = _layers(updates, layers)
    norms = _norms(jax.tree.leaves(updates), found)
    none, one = jnp.zeros(found.total, bool), jnp.ones(found.total)
    return _clipped(updates, found, norms, none, (one, one))
