"""Clipping a client's update: per layer, globally, or not at all.

Every rule here is a pure `optax.GradientTransformation` with the state `ClipState`, so a client's
chain can hold it, `jax.vmap` can batch it over clients, and its diagnostics come out as arrays.

What holds for any input, in float32 arithmetic and for every dtype of the leaves:

* the clipped update's L2 norm (in exact arithmetic) is at most `clip_norm * (1 + 1e-6)`, and each
  layer's norm at most its own bound times `1 + 1e-6`;
* an update with a NaN or an infinity anywhere becomes exactly zero and `ClipState.finite` is False;
* an update within its bounds is returned bit for bit, and clipping twice is clipping once.

A layer is every array of the parameters (as in the per-layer clipping of differentially private
federated speech recognition, arXiv 2310.00098), or a group of arrays named by a function of their
path, such as "encoder/block_0/mlp/kernel".
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr import stacks
from fedasr.errors import UserError
from fedasr.privacy import stacked
from fedasr.privacy.norms import (
    MARGIN,
    RESCALE,
    SAFE,
    Grouping,
    Layers,
    Norm,
    factors_to,
    grouped,
    select,
)
from fedasr.privacy.norms import ClipState as ClipState

Budget = str | Callable[[tuple[int, ...]], Sequence[float]]

_MIN_BOUND, _MAX_BOUND = 1e-30, 1e10


def layer_names(params: Any, layers: Layers = None) -> list[str]:
    """Names of the layers of `params`, in the order of `ClipState.norms`.

    Args:
      params: any pytree of floating-point arrays.
      layers: None for one layer per array, or a function from an array's path (keys joined by "/")
        to the name of its layer.
    """
    return list(grouped(params, layers).names)


def layer_index(params: Any, layers: Layers = None) -> tuple[tuple[int, ...], int]:
    """The layer of every leaf of `params`, in the order of `ClipState.norms`, and their number."""
    grouping = grouped(params, layers)
    return grouping.layer_of, len(grouping.names)


def layer_bounds(
    params: Any, clip_norm: float, budget: Budget = "uniform", layers: Layers = None
) -> np.ndarray:
    """Per-layer clipping bounds C_h with sum_h C_h^2 = C^2 (arXiv 2310.00098, per-layer clipping).

    Args:
      params: any pytree of floating-point arrays; only shapes are read.
      clip_norm: C, the L2 norm that the whole update may have.
      budget: "uniform" (C_h = C / sqrt(H)), "dim" (C_h = C * sqrt(d_h / sum_i d_i)), or a callable
        from the layers' sizes d to non-negative weights w, for C_h = C * sqrt(w_h / sum_i w_i).
      layers: see `layer_names`.

    Returns:
      float64 [H].

    Raises:
      UserError: for an unknown budget, unusable weights, or a bound that float32 cannot honour.
    """
    _check_clip_norm(clip_norm)
    return _bounds(grouped(params, layers), clip_norm, budget)


def _check_clip_norm(clip_norm: float) -> None:
    if not _MIN_BOUND <= clip_norm <= _MAX_BOUND:
        raise UserError(
            f"clip_norm must lie in [{_MIN_BOUND:g}, {_MAX_BOUND:g}], not {clip_norm}; "
            "use no_clip() to leave updates unclipped."
        )


def _check_budget(budget: Budget) -> None:
    if not (callable(budget) or budget in ("uniform", "dim")):
        raise UserError(f"budget must be 'uniform', 'dim' or a callable, not {budget!r}.")


def _bounds(grouping: Grouping, clip_norm: float, budget: Budget) -> np.ndarray:
    _check_budget(budget)
    sizes = grouping.sizes
    if callable(budget):
        weights = np.asarray(budget(sizes), np.float64)
    else:
        weights = np.asarray(sizes if budget == "dim" else np.ones(len(sizes)), np.float64)
    usable = weights.shape == (len(sizes),) and np.all(np.isfinite(weights) & (weights >= 0))
    if not (usable and weights.sum() > 0):
        raise UserError(
            f"budget must give {len(sizes)} non-negative finite weights with a positive sum, "
            f"one per layer; it gave {weights.tolist()}."
        )
    bounds = clip_norm * np.sqrt(weights / weights.sum())
    if np.any((bounds > 0) & (bounds < _MIN_BOUND)):
        raise UserError(f"budget leaves a layer a bound below {_MIN_BOUND:g}; give it 0 or more.")
    return bounds


# Scalars, one layer at a time: vectors over layers would cost XLA twice the time to compile. The
# barriers keep it from recomputing scalars for every element that they scale.
def _layer_norm(leaves: Sequence[chex.Array]) -> Norm:
    """L2 norm of several arrays together, free of overflow and of harmful underflow."""
    leaves = [leaf.astype(jnp.float32) for leaf in leaves]
    peak = _combine([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves], jnp.max)
    scale = jnp.where(peak > SAFE, RESCALE, jnp.where(peak < 1 / SAFE, 1 / RESCALE, 1.0))
    inverse = jax.lax.optimization_barrier(1 / scale)
    square = _combine([jnp.sum(jnp.square(leaf * inverse)) for leaf in leaves], jnp.sum)
    return Norm(jnp.sqrt(square), scale, jnp.isfinite(peak))


def _combine(values: Sequence[chex.Array], reduce: Callable) -> chex.Array:
    return reduce(jnp.stack(values)) if len(values) > 1 else values[0]


def _layer_norms(leaves: Sequence[chex.Array], grouping: Grouping) -> list[Norm]:
    return [
        _layer_norm([leaf for leaf, i in zip(leaves, grouping.layer_of, strict=True) if i == layer])
        for layer in range(len(grouping.names))
    ]


def _joint_norm(norms: Sequence[Norm]) -> Norm:
    """The norm of all layers together."""
    root, layer_scale, finite = (jnp.stack(part) for part in zip(*norms, strict=True))
    scale = layer_scale.max()
    return Norm(jnp.sqrt(jnp.sum(jnp.square(root * (layer_scale / scale)))), scale, finite.all())


def _state(norms: Sequence[Norm], clipped: chex.Array) -> ClipState:
    finite = jnp.stack([norm.finite for norm in norms]).all()
    values = jnp.stack([norm.value() for norm in norms])
    return ClipState(jnp.where(finite, values, 0.0), clipped & finite, finite)


def _initial_state(params: Any, layers: Layers) -> ClipState:
    count = len(grouped(params, layers).names)
    return ClipState(jnp.zeros(count, jnp.float32), jnp.zeros(count, bool), jnp.zeros((), bool))


def clip_layers(
    updates: Any,
    clip_norm: float,
    budget: Budget = "uniform",
    layers: Layers = None,
    normalise: bool = False,
) -> tuple[Any, ClipState]:
    """Clips every layer h of `updates` to its own bound C_h (see `layer_bounds`).

    Args:
      updates: any pytree of floating-point arrays.
      clip_norm, budget, layers: see `layer_bounds`.
      normalise: do as the public code of arXiv 2310.00098 does: an update within `clip_norm` is
        left alone, any other has every layer brought to norm C_h, small ones scaled up.

    Returns:
      The clipped updates, of the same shapes and dtypes, and the `ClipState`.
    """
    _check_clip_norm(clip_norm)
    grouping = grouped(updates, layers)
    bounds = _bounds(grouping, clip_norm, budget).astype(np.float32)
    if stacks.is_stacked(updates):
        return stacked.clip_layers(updates, bounds, clip_norm, layers, normalise)
    leaves, treedef = jax.tree.flatten(updates)
    norms = _layer_norms(leaves, grouping)
    # A bound of zero admits nothing at all, not even what underflows in the norm.
    clipped = [(n.value() > bound) | (bound == 0) for n, bound in zip(norms, bounds, strict=True)]
    if normalise:
        clipped = [_joint_norm(norms).value() > np.float32(clip_norm)] * len(norms)
    state = _state(norms, jnp.stack(clipped))
    factors = [
        factors_to(norm, bound * np.float32(1 - MARGIN))
        for norm, bound in zip(norms, bounds, strict=True)
    ]
    clipped, factors, finite = jax.lax.optimization_barrier((clipped, factors, state.finite))
    out = []
    for leaf, layer in zip(leaves, grouping.layer_of, strict=True):
        first, second = factors[layer]
        small = leaf.astype(jnp.float32) * first * second
        out.append(select(clipped[layer], finite, small, leaf))
    return jax.tree.unflatten(treedef, out), state


def clip_all(updates: Any, clip_norm: float, layers: Layers = None) -> tuple[Any, ClipState]:
    """Clips `updates` as one vector to L2 norm `clip_norm`, by `optax.clip_by_global_norm`.

    Around optax are a guard against non-finite updates, and a rescaling of updates whose squares
    float32 cannot hold: whatever exceeds the bound is clipped to the same result from any length.

    Args:
      updates: any pytree of floating-point arrays.
      clip_norm: C, the L2 norm that the whole update may have.
      layers: see `layer_names`; only the reported norms depend on it.

    Returns:
      The clipped updates, of the same shapes and dtypes, and the `ClipState`.
    """
    _check_clip_norm(clip_norm)
    if stacks.is_stacked(updates):
        return stacked.clip_all(updates, clip_norm, layers)
    grouping = grouped(updates, layers)
    leaves, treedef = jax.tree.flatten(updates)
    norms = _layer_norms(leaves, grouping)
    norm = _joint_norm(norms)
    clip = norm.value() > np.float32(clip_norm)
    state = _state(norms, jnp.full(len(norms), clip))

    # Long or short beyond float32's squares: bring the norm to 2^40, above any bound there is.
    first, second = factors_to(norm, SAFE)
    factors = first, jnp.where(norm.scale == 1, 1.0, second)
    # An infinite bound leaves alone what is within ours, so that optax's own rounding of the
    # norm cannot clip a second time what was clipped once.
    max_norm = jnp.where(clip, np.float32(clip_norm * (1 - MARGIN)), jnp.inf)
    (first, second), clip, finite = jax.lax.optimization_barrier((factors, clip, state.finite))
    scaled = [leaf.astype(jnp.float32) * first * second for leaf in leaves]
    small, _ = optax.clip_by_global_norm(max_norm).update(scaled, optax.EmptyState())
    out = [select(clip, finite, new, leaf) for new, leaf in zip(small, leaves, strict=True)]
    return jax.tree.unflatten(treedef, out), state


def guard_finite(updates: Any, layers: Layers = None) -> tuple[Any, ClipState]:
    """Zeros instead of an update that holds a NaN or an infinity; anything else is untouched."""
    if stacks.is_stacked(updates):
        return stacked.guard_finite(updates, layers)
    grouping = grouped(updates, layers)
    norms = _layer_norms(jax.tree.leaves(updates), grouping)
    state = _state(norms, jnp.zeros(len(grouping.names), bool))
    return jax.tree.map(lambda x: jnp.where(state.finite, x, jnp.zeros_like(x)), updates), state


def _stateful(rule: Callable[[Any], tuple[Any, ClipState]], layers: Layers):
    def update(updates, state, params=None):
        del state, params
        return rule(updates)

    return optax.GradientTransformation(lambda params: _initial_state(params, layers), update)


def clip_by_layer(
    clip_norm: float,
    budget: Budget = "uniform",
    *,
    layers: Layers = None,
    normalise: bool = False,
) -> optax.GradientTransformation:
    """Per-layer clipping (`clip_layers`) as an optax transformation with state `ClipState`.

    The whole update's L2 norm, hence the sensitivity to one user, is at most `clip_norm`.

    Raises:
      UserError: at once for an unusable clip_norm or budget name; on the first parameters for a
        budget callable whose weights do not fit them.
    """
    _check_clip_norm(clip_norm)
    _check_budget(budget)
    return _stateful(
        lambda updates: clip_layers(updates, clip_norm, budget, layers, normalise), layers
    )


def clip_global(clip_norm: float, *, layers: Layers = None) -> optax.GradientTransformation:
    """Clipping of the whole update as one vector (`clip_all`), with state `ClipState`."""
    _check_clip_norm(clip_norm)
    return _stateful(lambda updates: clip_all(updates, clip_norm, layers), layers)


def no_clip(*, layers: Layers = None) -> optax.GradientTransformation:
    """Only the guard against non-finite updates (`guard_finite`), with state `ClipState`."""
    return _stateful(lambda updates: guard_finite(updates, layers), layers)
