"""Clipping bounds that follow a quantile of the users' update norms.

Every bound is its starting value times a scale that the server moves after each round: down while
more than the wanted share of users stay within the bound, up while fewer do (Andrew et al., 2021,
arXiv 1905.03871). The share is a query about the round's users like their sum, noised and accounted
for together with it. One scale serves a global clip; under a per-layer budget each layer has its
own (and hears its own noisy share), and the noise on a layer follows its bound.

Clients divide their update by the scales and clip it as ever, the server multiplies the noisy mean
by them: the sensitivity of the sum is that of the starting bounds, whatever the scales are.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError
from fedasr.privacy import noise
from fedasr.privacy.clipping import ClipState, Layers, layer_index

# Scales stay here, so that a long stretch of one-sided shares cannot leave float32.
_MIN_SCALE, _MAX_SCALE = 1e-12, 1e12


@dataclasses.dataclass(frozen=True)
class AdaptiveClip:
    """How bounds adapt.

    Attributes:
      noise_multiplier: standard deviation of the noise on the summed votes over what one user can
        change in them, above 0; 0 only where the whole mechanism has no noise.
      quantile: share of users that should stay within a bound, in (0, 1).
      rate: a scale moves by a factor exp(-rate * (share - quantile)) a round.
      warmup: so many rounds at first move the bounds alone: the model and its optimiser do not
        meet the noise of bounds that begin far too large (see `hold`). They are accounted for
        like all others.
      warmup_rate: the rate in these rounds.

    Raises:
      UserError: if an argument is out of range.
    """

    noise_multiplier: float
    quantile: float = 0.5
    rate: float = 0.2
    warmup: int = 0
    warmup_rate: float = 4.0

    def __post_init__(self):
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise UserError(f"the counts' noise must be finite and >= 0, not {self}.")
        if not 0 < self.quantile < 1:
            raise UserError(f"quantile={self.quantile} must lie between 0 and 1")
        for name in ("rate", "warmup_rate"):
            if not 0 < getattr(self, name) <= 10:
                raise UserError(f"{name}={getattr(self, name)} must be above 0 and at most 10")
        if self.warmup < 0:
            raise UserError(f"warmup={self.warmup} must be 0 or more")


class ClientView(NamedTuple):
    """What the server sends when bounds adapt: the model and float32 scales, [layers] or [1]."""

    params: Any
    scales: chex.Array


class ScaledClipState(NamedTuple):
    """As `clipping.ClipState`, norms in the update's own units, and the scales, [layers] or [1]."""

    norms: chex.Array
    clipped: chex.Array
    finite: chex.Array
    scales: chex.Array


class AdaptiveState(NamedTuple):
    """scales: float32 [layers] or [1]. count: int32 scalar, rounds so far."""

    scales: chex.Array
    count: chex.Array


def _by_leaf(tree: Any, scales: chex.Array, layers: Layers) -> Any:
    """The scale of every leaf of `tree`."""
    index, _ = layer_index(tree, layers)
    shared = scales.shape[0] == 1
    return jax.tree.unflatten(
        jax.tree.structure(tree), [scales[0 if shared else layer] for layer in index]
    )


def clip_scaled(
    clip: optax.GradientTransformation, layers: Layers = None
) -> optax.GradientTransformation:
    """`clip` for updates divided by scales; `init` takes a `ClientView`, its scales are the state.

    Args:
      clip: with state `clipping.ClipState`.
      layers: as `clip` has it.
    """

    def init(view):
        state = clip.init(view.params)
        return ScaledClipState(*state, scales=view.scales)

    def update(updates, state, params=None):
        del params
        by_leaf = _by_leaf(updates, state.scales, layers)
        scaled = jax.tree.map(
            lambda u, s: (u.astype(jnp.float32) / s).astype(u.dtype), updates, by_leaf
        )
        scaled, inner = clip.update(scaled, ClipState(*state[:3]))
        return scaled, ScaledClipState(
            inner.norms * state.scales, inner.clipped, inner.finite, state.scales
        )

    return optax.GradientTransformation(init, update)


def adapt_scales(
    adaptive: AdaptiveClip,
    expected_cohort: float,
    key: chex.PRNGKey,
    layers: Layers = None,
    shared: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the noisy mean by the scales, then moves them by the round's noisy votes.

    A user's vote on a bound is 1/2 for staying within it, -1/2 for being clipped, 0 for an update
    that was not finite; the votes on m bounds together change by at most sqrt(m) / 2.

    Args:
      adaptive: see `AdaptiveClip`.
      expected_cohort: what the summed votes are divided by.
      key: for the noise on the votes, used for nothing else.
      layers: as the clipping has it.
      shared: one scale for all layers.

    Returns:
      A transformation with state `AdaptiveState` whose `update` takes `clipped`, float32 [layers],
      the number of users clipped in each layer, and `clients`, that of users with a finite update.
    """

    votes_noise = adaptive.noise_multiplier
    reach = noise.reach_for(1 / votes_noise if votes_noise else 0.0)

    def init(params):
        _, count = layer_index(params, layers)
        return AdaptiveState(jnp.ones(1 if shared else count), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, clipped, clients, **extra):
        del params, extra
        by_leaf = _by_leaf(updates, state.scales, layers)
        updates = jax.tree.map(
            lambda u, s: (u.astype(jnp.float32) * s).astype(u.dtype), updates, by_leaf
        )
        bounds = state.scales.shape[0]
        votes = jnp.asarray(clients, jnp.float32) / 2 - clipped[:bounds]
        std = adaptive.noise_multiplier * math.sqrt(bounds) / 2
        drawn = noise.standard_normal(jax.random.fold_in(key, state.count), bounds, reach)
        share = (votes + std * drawn) / expected_cohort + 0.5
        warm = state.count < adaptive.warmup
        rate = jnp.where(warm, adaptive.warmup_rate, adaptive.rate)
        scales = state.scales * jnp.exp(-rate * (share - adaptive.quantile))
        scales = jnp.clip(scales, _MIN_SCALE, _MAX_SCALE)
        return updates, AdaptiveState(scales, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


class HeldState(NamedTuple):
    """inner: of the held transformation. count: int32 scalar, updates so far."""

    inner: optax.OptState
    count: chex.Array


def hold(transform: optax.GradientTransformation, rounds: int) -> optax.GradientTransformation:
    """Zero updates and an untouched state for so many rounds, then `transform`.

    For the server's optimiser while bounds warm up: one that adapts to the size of gradients would
    remember the noise of the first rounds long after.
    """
    if rounds == 0:
        return transform

    def init(params):
        return HeldState(transform.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        new, inner = transform.update(updates, state.inner, params)
        held = state.count < rounds

        def choose(before, after):
            return jnp.where(held, before, after)

        new = jax.tree.map(lambda u: choose(jnp.zeros_like(u), u), new)
        inner = jax.tree.map(choose, state.inner, inner)
        return new, HeldState(inner, optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def scales_of(opt_state: optax.OptState) -> chex.Array:
    """The scales in a server's optimiser state."""

    def ours(path, value):
        del value
        return getattr(path[-1], "tuple_name", "") == AdaptiveState.__name__

    return optax.tree.get(opt_state, "scales", filtering=ours)
