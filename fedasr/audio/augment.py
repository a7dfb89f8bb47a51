"""SpecAugment (Park et al., arXiv 1904.08779) with the paper's policy and without time warping."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.fields import check_dataclass


@dataclass(frozen=True)
class SpecAugmentConfig:
    """The masking policy; the defaults are those of arXiv 2310.00098 but for `inclusive`.

    Attributes:
      frequency_masks: number of bands of mel channels masked.
      frequency_width: greatest width of a band, in channels ("F").
      time_masks: number of spans of frames masked.
      time_width: greatest width of a span, in frames ("T").
      time_fraction: greatest width of a span as a fraction of the utterance ("p").
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

    def __post_init__(self):
        check_dataclass(self, "SpecAugment's")
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


def spec_augment(
    features: jax.Array,
    length: jax.Array | int,
    key: jax.Array,
    config: SpecAugmentConfig = SpecAugmentConfig(),
) -> jax.Array:
    """Sets random bands of channels and spans of frames to 0, the mean of normalised features.

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
    draws = jax.random.uniform(key, (2, config.frequency_masks + config.time_masks))
    band = min(config.frequency_width, mels)
    longest = jnp.floor(config.time_fraction * length).astype(jnp.int32)
    span = jnp.minimum(longest, config.time_width)
    channels = _spans(draws[:, : config.frequency_masks], band, mels, mels, config.inclusive)
    times = _spans(draws[:, config.frequency_masks :], span, length, frames, config.inclusive)
    inside = jnp.arange(frames) < length
    masked = inside[:, None] & (times[:, None] | channels)
    return jnp.where(masked, 0, features)
