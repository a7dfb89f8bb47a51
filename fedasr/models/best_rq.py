"""Masked prediction of random codes (BEST-RQ): training of an encoder without transcripts.

Chiu et al., "Self-supervised learning with random-projection quantizer for speech recognition"
(arXiv 2202.01855). Spans of the features are replaced by noise, and the encoder is to tell, in the
frames that are hidden, the code of what was there: that of a random codebook which lies nearest to
a random projection of the features. Projection and codebook are drawn once and never trained: they
are the same in all runs of one shape. The output layer scores the codes. A run that starts from
such a one and has another objective takes its encoder and begins with a new output layer
(`fedasr.training.starts`).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.models.objectives import Recogniser, from_forward
from fedasr.streams import Stream, generator, seed_key

OBJECTIVE, OUTPUT = "best_rq", "output"  # the latter: the layer that scores codes
_NOISE = 0.1  # standard deviation of what hides the features, as published; theirs is 1
_EPSILON = 1e-5


@functools.lru_cache(maxsize=8)
def quantizer(width: int, dim: int, codes: int) -> tuple[np.ndarray, np.ndarray]:
    """The random projection, float32 [width, dim], and codebook, float32 [codes, dim].

    The projection is drawn as Xavier initialises, uniformly; codes are normal, of length 1.
    """
    rng = generator(Stream.CODES, width, dim, codes)
    bound = np.sqrt(6.0 / (width + dim))
    projection = rng.uniform(-bound, bound, (width, dim))
    book = rng.normal(size=(codes, dim))
    book /= np.linalg.norm(book, axis=1, keepdims=True)
    return projection.astype(np.float32), book.astype(np.float32)


def stacked(features: jax.Array, lengths: jax.Array, stride: int, frames: int) -> jax.Array:
    """What each encoder frame stands for: `stride` feature frames side by side, normalised.

    Args:
      features: float32 [b, t, f]; what lies beyond `lengths` does not matter.
      lengths: int32 [b], true frames.
      stride: feature frames of an encoder frame. frames: encoder frames.

    Returns:
      float32 [b, frames, stride * f]: each channel of an utterance has mean 0 and variance 1 over
      its true frames; zeros beyond them.
    """
    inside = (jnp.arange(features.shape[1]) < lengths[:, None])[..., None]
    count = jnp.maximum(lengths, 1)[:, None, None]
    mean = jnp.sum(jnp.where(inside, features, 0.0), axis=1, keepdims=True) / count
    centred = jnp.where(inside, features - mean, 0.0)
    variance = jnp.sum(centred**2, axis=1, keepdims=True) / count
    normed = centred * jax.lax.rsqrt(variance + _EPSILON)
    room = frames * stride
    normed = jnp.pad(normed[:, :room], ((0, 0), (0, max(0, room - normed.shape[1])), (0, 0)))
    return normed.reshape(len(normed), frames, -1)


def targets(features: jax.Array, lengths: jax.Array, config: Any, frames: int) -> jax.Array:
    """The codes of encoder frames, int32 [b, frames] in 0..codes-1; see `stacked`.

    The nearest code to a projection of length 1 is that of the largest product, whatever its
    length.
    """
    x = stacked(features, lengths, config.stride, frames)
    projection, book = quantizer(x.shape[-1], config.code_dim, config.codes)
    scores = jnp.dot(x, projection @ book.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def spans(keys: jax.Array, frames: int, config: Any) -> jax.Array:
    """Which encoder frames are hidden, bool [b, frames]: the same whatever the padding.

    A span of `mask_span` frames begins at each frame with probability `mask_start`.
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, config.mask_start, (frames,)))
    begun = jnp.cumsum(draw(keys), axis=1)
    before = jnp.pad(begun, ((0, 0), (config.mask_span, 0)))[:, :frames]
    return begun > before


def hidden(features: jax.Array, mask: jax.Array, keys: jax.Array, stride: int) -> jax.Array:
    """Features with noise of the same mean in place of what is hidden.

    Args:
      features: float32 [b, t, f]. mask: of `spans`. keys: [b].
      stride: feature frames of an encoder frame.
    """
    frames = jnp.repeat(mask, stride, axis=1)[:, : features.shape[1]]
    # Where the encoder counts fewer frames, the rest is not hidden.
    frames = jnp.pad(frames, ((0, 0), (0, features.shape[1] - frames.shape[1])))
    draw = jax.vmap(lambda key: jax.random.normal(key, features.shape[1:]))
    return jnp.where(frames[..., None], _NOISE * draw(keys), features)


def _children(keys: jax.Array) -> list[jax.Array]:
    """Two independent keys of each of the batch's [b]."""
    return [jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(2)]


def recogniser(
    module: Any, config: Any, augment: SpecAugmentConfig | None, init: Any
) -> Recogniser:
    """Wraps a linen encoder `module(features, lengths, keys) -> (logits, lengths)`.

    The loss of an utterance is the mean cross-entropy of its hidden frames, in nats; one without
    any does not count. `evaluate` hides by a key of its own, the same for all utterances, and finds
    no tokens: error rates are those of silence, and say nothing.

    Args:
      module: such as `Transformer`. config: its own, a `fedasr.models.transducer.ObjectiveConfig`.
      augment: None; features are hidden here. init: from a key to the module's parameters.

    Raises:
      UserError: SpecAugment is asked for.
    """
    if augment is not None:
        raise UserError("objective='best_rq' masks features itself: set augment.enabled=False")

    def forward(params, batch: Mapping[str, jax.Array], features, keys):
        count, lengths = len(batch["mask"]), batch["features_length"]
        frames = -(-features.shape[1] // config.stride)
        own = None
        if keys is None:
            keys = jnp.broadcast_to(seed_key(0, Stream.CODES), (count,))
        else:
            own, keys = _children(keys)
        where, what = _children(keys)
        mask = spans(where, frames, config)
        shown = hidden(features, mask, what, config.stride)
        shared = {"batch_key": batch["batch_key"]} if "batch_key" in batch else {}
        logits, true = module.apply({"params": params}, shown, lengths, own, **shared)
        frames = logits.shape[1]
        wanted = targets(features, lengths, config, frames)
        counted = mask[:, :frames] & (jnp.arange(frames) < true[:, None])
        scores = jnp.where(counted[..., None], logits, 0.0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), wanted[..., None], axis=-1)
        number = jnp.sum(counted, axis=1)
        losses = jnp.sum(jnp.where(counted, -picked[..., 0], 0.0), axis=1)
        losses /= jnp.maximum(number, 1)
        return losses, losses, number > 0, count

    def decode(params, count):
        return jnp.zeros((count, 1), jnp.int32), jnp.zeros(count, jnp.int32)

    return from_forward(init, forward, decode, None, config)
