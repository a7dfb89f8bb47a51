"""Building blocks whose result never depends on padding.

Activations are [batch, time, features]. Randomness comes as one key per utterance and is drawn with
time as the leading axis: JAX's counter-based generator then gives an utterance the same numbers
however far it is padded.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def uniform_fan_in(scale: float = 1.0 / 3.0) -> nn.initializers.Initializer:
    """Uniform variance scaling over fan-in: U(-a, a), a = sqrt(3 scale / fan_in)."""
    return nn.initializers.variance_scaling(scale, "fan_in", "uniform")


def split_keys(keys: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Derives `count` independent keys from each of the batch's keys [b]; None stays None."""
    if keys is None:
        return [None] * count
    return [jax.vmap(lambda k: jax.random.fold_in(k, i))(keys) for i in range(count)]  # noqa: B023


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Inverted dropout with a key per utterance.

    Args:
      x: [b, t, ...]. Axis 1 is time: a longer padding draws the same mask for the same frames.
      rate: probability that an element is dropped. keys: [b], or None for no dropout.
    """
    if rate == 0.0 or keys is None:
        return x
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def patches(x: jax.Array, width: int, stride: int) -> jax.Array:
    """Windows of frames, so that a dense layer acts as a strided 1-D convolution.

    A convolution with per-client kernels would lower to a slow grouped convolution under vmap.

    Args:
      x: [b, t, f], zero beyond each utterance's length.

    Returns:
      [b, ceil(t / stride), width * f]; window i is centred on frame i * stride ("same" padding).
    """
    out = -(-x.shape[1] // stride)
    left = (width - 1) // 2
    right = max(0, (out - 1) * stride + width - left - x.shape[1])
    padded = jnp.pad(x, ((0, 0), (left, right), (0, 0)))
    views = [padded[:, i : i + (out - 1) * stride + 1 : stride] for i in range(width)]
    return jnp.concatenate(views, axis=-1)


def sinusoidal_positions(positions: jax.Array, features: int) -> jax.Array:
    """Sines and cosines of real-valued positions [b, t] -> float32 [b, t, features].

    Frequencies fall geometrically from 1 to 1e-4 radians per unit (Vaswani et al., 2017).
    """
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
    angles = positions[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MaskedNorm(nn.Module):
    """Zero mean and unit variance over the true frames of each utterance, scalar scale and bias."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """x: float32 [b, t, f]; lengths: int32 [b]. Padding frames come out as zeros."""
        scale = self.param("scale", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, ())
        mask = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        count = jnp.maximum(lengths * x.shape[2], 1)[:, None, None]
        mean = jnp.sum(jnp.where(mask, x, 0.0), axis=(1, 2), keepdims=True) / count
        centred = jnp.where(mask, x - mean, 0.0)
        variance = jnp.sum(centred**2, axis=(1, 2), keepdims=True) / count
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        return jnp.where(mask, normed * scale + bias, 0.0)


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases; padding frames are never attended to."""

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x: [b, t, d]; mask: bool [b, t], True for true frames; keys: [b] or None."""
        b, t, d = x.shape
        qkv = nn.Dense(
            3 * d, use_bias=False, kernel_init=uniform_fan_in(), dtype=self.dtype, name="qkv"
        )(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, self.heads, d // self.heads), 2, 0)
        scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) * (d // self.heads) ** -0.5
        scores = jnp.where(mask[:, None, None, :], scores.astype(jnp.float32), -1e30)
        weights = jax.nn.softmax(scores, axis=-1)
        if self.dropout and keys is not None:
            # One key per (utterance, query frame), so that neither time axis's padding matters.
            frames = jnp.arange(t)
            keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(frames))(keys)
            draw = jax.vmap(lambda k: dropout(jnp.ones((1, t, self.heads)), self.dropout, k[None]))
            kept = jax.vmap(draw)(keys)[:, :, 0]
            weights = weights * jnp.transpose(kept, (0, 3, 1, 2))
        context = jnp.einsum("bhqk,bkhe->bqhe", weights.astype(self.dtype), v).reshape(b, t, d)
        return nn.Dense(
            d, use_bias=False, kernel_init=uniform_fan_in(), dtype=self.dtype, name="out"
        )(context)


class FeedForward(nn.Module):
    """Two bias-free dense layers around a ReLU."""

    hidden: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x: [b, t, d] -> [b, t, d]; keys: [b] or None."""
        options = {"use_bias": False, "kernel_init": uniform_fan_in(), "dtype": self.dtype}
        hidden = jax.nn.relu(nn.Dense(self.hidden, name="up", **options)(x))
        return nn.Dense(x.shape[-1], name="down", **options)(dropout(hidden, self.dropout, keys))
