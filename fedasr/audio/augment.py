"""SpecAugment (Park et al., arXiv 1904.08779): masks, and warps of time and of frequency.

Warps are off unless asked for. That of time moves a point of the utterance, as SpecAugment's does,
by a share of the utterance instead of a number of frames; that of frequency moves a point of the
mel channels, as vocal tract length perturbation does (Jaitly and Hinton, "Vocal tract length
perturbation (VTLP) improves speech recognition", 2013). Both keep the ends, and so the lengths.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.fields import check_dataclass

_MOST_WARP = 0.2
_CHANNEL = 0.75  # of the mel channels: where the point of the warp of frequency lies


@dataclass(frozen=True)
class SpecAugmentConfig:
    """The masking policy; the defaults are those of arXiv 2310.00098 but for `inclusive`.

    Attributes:
      frequency_masks: number of bands of mel channels masked.
      frequency_width: greatest width of a band, in channels ("F").
      time_masks: number of spans of frames masked.
      time_width: greatest width of a span, in frames ("T").
      time_fraction: greatest width of a span as a fraction of the utterance ("p").
      time_warp: greatest move of a point of the utterance, as a fraction of it; the point lies in
        its middle half, so that tempo changes by up to two to four times as much. 0: none.
      frequency_warp: greatest move of the point at three quarters of the mel channels, as a
        fraction of the channels; 0.05 is about a tenth of a frequency in Hz. 0: none.
      inclusive: whether a mask may have the greatest width and end with the utterance, as in the
        SpecAugment paper; False as the programs of arXiv 2310.00098 draw: widths below the
        greatest, and at least one position after the mask.

    Raises:
      UserError: a value is out of range.
    """

    frequency_masks: int = 2
    frequency_width: int = 30
    time_masks: int = 10
    time_width: int = 50
    time_fraction: float = 0.1
    inclusive: bool = True
    time_warp: float = 0.0
    frequency_warp: float = 0.0

    def __post_init__(self):
        # Beyond that the point would come close to an end, and what lies between to nothing.
        warps = {"time_warp": (0, _MOST_WARP), "frequency_warp": (0, _MOST_WARP)}
        check_dataclass(self, "SpecAugment's", warps)
        counts = (self.frequency_masks, self.frequency_width, self.time_masks, self.time_width)
        if min(counts) < 0 or not 0 <= self.time_fraction <= 1:
            raise UserError(
                "SpecAugment's counts and widths must not be negative and time_fraction must lie "
                f"in [0, 1]: {self}"
            )


def _spans(
    draws: jax.Array,
    max_width: jax.Array | int,
    extent: jax.Array | int,
    size: int,
    inclusive: bool,
) -> jax.Array:
    """Which of `size` positions lie in any of several random spans within the first `extent`.

    Widths are uniform on 0..max_width and starts uniform on 0..extent - width, both inclusive or,
    but for a width of 0, both exclusive.

    Args:
      draws: float32 [2, spans], uniform on [0, 1): one row each for widths and starts.
    """
    width = jnp.floor(draws[0] * (max_width + inclusive)).astype(jnp.int32)
    start = jnp.floor(draws[1] * (extent - width + inclusive)).astype(jnp.int32)
    position = jnp.arange(size)[:, None]
    return ((position >= start) & (position < start + width)).any(axis=1)


def _sources(
    point: jax.Array | float, move: jax.Array, extent: jax.Array | int, size: int
) -> jax.Array:
    """Where each of `size` positions comes from, float32 [size].

    Positions 0 and extent - 1 stay, `point` of the way between them comes from `point + move`, and
    what lies between follows in proportion. Positions beyond stay, too.
    """
    last = jnp.maximum(jnp.asarray(extent, jnp.float32) - 1, 0)
    position = jnp.arange(size, dtype=jnp.float32)
    centre, source = point * last, (point + move) * last
    before = position * (point + move) / point
    after = source + (position - centre) * (1 - point - move) / (1 - point)
    moved = jnp.where(position < centre, before, after)
    return jnp.where(position < last, moved, position)


def _warped(
    features: jax.Array, length: jax.Array, draws: jax.Array, config: SpecAugmentConfig
) -> jax.Array:
    """Features [frames, mels] at warped positions, between neighbours in proportion.

    Args:
      draws: float32 [2, 2], uniform on [0, 1): the moves of time and frequency, the point in time.
    """
    frames, mels = features.shape
    moves = 2 * draws[0] - 1
    if config.frequency_warp:
        sources = _sources(_CHANNEL, moves[1] * config.frequency_warp, mels, mels)
        distance = jnp.abs(jnp.arange(mels)[:, None] - sources)
        shares = jnp.maximum(1 - distance, 0).astype(features.dtype)
        inside = (jnp.arange(frames) < length)[:, None]
        # Padding may hold anything, and is returned as it is.
        features = jnp.where(inside, jnp.where(inside, features, 0) @ shares, features)
    if config.time_warp:
        point = 0.25 + 0.5 * draws[1, 0]
        sources = _sources(point, moves[0] * config.time_warp, length, frames)
        first = jnp.clip(jnp.floor(sources).astype(jnp.int32), 0, frames - 1)
        second = jnp.minimum(first + 1, frames - 1)
        share = (sources - first)[:, None].astype(features.dtype)
        between = (1 - share) * features[first] + share * features[second]
        features = jnp.where(share > 0, between, features[first])
    return features


def spec_augment(
    features: jax.Array,
    length: jax.Array | int,
    key: jax.Array,
    config: SpecAugmentConfig = SpecAugmentConfig(),
) -> jax.Array:
    """Sets random bands of channels and spans of frames to 0, the mean of normalised features.

    Before that, time and frequency are warped where the policy says so.

    What is masked depends on `key` and `length` alone, not on how far the utterance is padded;
    padded frames are returned as they are. For a batch, vmap over features, lengths and keys.

    Args:
      features: float [frames, mels], normalised per utterance.
      length: number of true frames, possibly traced; at most frames.
      key: random key of this utterance and step.
      config: static policy.

    Returns:
      Array of the shape and dtype of `features`.
    """
    frames, mels = features.shape
    length = jnp.asarray(length, jnp.int32)
    # All draws at once: one call of the generator instead of four compiles and runs much faster.
    masks = config.frequency_masks + config.time_masks
    warps = 2 * bool(config.time_warp or config.frequency_warp)
    draws = jax.random.uniform(key, (2, masks + warps))
    if warps:
        features = _warped(features, length, draws[:, masks:], config)
    draws = draws[:, :masks]
    band = min(config.frequency_width, mels)
    longest = jnp.floor(config.time_fraction * length).astype(jnp.int32)
    span = jnp.minimum(longest, config.time_width)
    channels = _spans(draws[:, : config.frequency_masks], band, mels, mels, config.inclusive)
    times = _spans(draws[:, config.frequency_masks :], span, length, frames, config.inclusive)
    inside = jnp.arange(frames) < length
    masked = inside[:, None] & (times[:, None] | channels)
    return jnp.where(masked, 0, features)
