"""What pretrained encoders are made of: layers with biases, and convolutions as dense products.

A convolution whose kernels differ among vmapped clients lowers to a slow grouped convolution, so
there is none here. Padding frames are zeros before frames meet.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.generators import DrawingConfig
from fedasr.kernels import attention as attentions
from fedasr.kernels.dense import product
from fedasr.kernels.frontend import patches
from fedasr.models import layers

_NEVER = -1e30  # the score of what is not attended to
_TAPS = 8  # of a grouped convolution that are one product
Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ComputeConfig(DrawingConfig):
    """What all pretrained models have besides their sizes.

    Attributes:
      dropout: on hidden units and branches. layer_drop: probability that a training step skips a
        block. dtype: of the compute. remat, attention, generator: as of the project's own
        encoders.
    """

    dropout: float = 0.0
    layer_drop: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "plain"

    def check(self, *sizes: str) -> None:
        """Raises UserError for an option out of range; `sizes`: of which each is at least 1."""
        layers.check_options(self, sizes)

    @property
    def compute(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)


def numbers(config: Any, name: str) -> tuple[int, ...]:
    """The whole numbers in a field of a configuration, such as "10,3,3".

    Raises:
      UserError: it holds something else.
    """
    text = getattr(config, name)
    if not re.fullmatch(r"(\d{1,9}(,\d{1,9})*)?", text):
        raise UserError(f"the model's {name} must be whole numbers with commas between: {text!r}")
    return tuple(int(part) for part in text.split(",") if part)


def written(values: Any) -> str:
    """The inverse of `numbers`."""
    return ",".join(str(int(value)) for value in values)


def dense(features: int, dtype: jnp.dtype, name: str | None, bias: bool = True) -> layers.Dense:
    """A dense layer that is computed in `dtype`; in `setup` it has the name that it is given."""
    init = layers.uniform_fan_in(1.0)
    return layers.Dense(features, use_bias=bias, kernel_init=init, dtype=dtype, name=name)


def gelu(x: Array) -> Array:
    """The exact one, by the error function."""
    return jax.nn.gelu(x, approximate=False)


def biased_attention(q: Array, k: Array, v: Array, mask: Array, bias: Array | None) -> Array:
    """Attention whose scores have something added.

    Args:
      q, k, v: [b, t, heads, e], keys of a length of their own.
      mask: bool, broadcast to [b, heads, queries, keys].
      bias: float, likewise, added to scaled scores; None for none.
    """
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores if bias is None else scores + bias, _NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", weights, v)


def projections(
    x: Array, heads: int, dtype: jnp.dtype, bias: bool = True, key_bias: bool = True
) -> tuple[Array, Array, Array]:
    """Queries, keys and values, [b, t, heads, e]; makes the layers of the module that calls.

    x: [b, t, d]. key_bias: whether keys have biases, too.
    """
    b, t, d = x.shape
    shape = (b, t, heads, d // heads)
    q = dense(d, dtype, "query", bias)(x).reshape(shape)
    k = dense(d, dtype, "key", bias and key_bias)(x).reshape(shape)
    return q, k, dense(d, dtype, "value", bias)(x).reshape(shape)


class Attention(nn.Module):
    """Self-attention with biases; padding frames are never attended to.

    key_bias: whether keys have one. fused: see `attention.fused_attention`.
    """

    heads: int
    dtype: jnp.dtype
    key_bias: bool = True
    fused: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array, train: bool) -> Array:
        """x: [b, t, d]; mask: bool [b, t], True for true frames; train: whether to derive."""
        q, k, v = projections(x, self.heads, self.dtype, True, self.key_bias)
        last = dense(x.shape[2], self.dtype, "out")
        long = not train and x.shape[1] > attentions.LONG
        if self.fused:
            return last(attentions.fused_attention(q, k, v, mask, long).reshape(x.shape))
        if long:
            return last(attentions.long_attention(q, k, v, mask).reshape(x.shape))
        return last(attentions.attention(q, k, v, mask, None).reshape(x.shape))


class FeedForward(nn.Module):
    """Two dense layers with biases around an activation."""

    hidden: int
    dropout: float
    dtype: jnp.dtype
    activation: Any = gelu
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array, keys: Array | None) -> Array:
        """x: [b, t, d] -> [b, t, d]; keys: [b] or None."""
        hidden = self.activation(dense(self.hidden, self.dtype, "up", self.bias)(x))
        down = dense(x.shape[-1], self.dtype, "down", self.bias)
        return down(layers.dropout(hidden, self.dropout, keys))


class Convolution(nn.Module):
    """A strided convolution over time; its windows begin `left` frames before their place."""

    features: int
    width: int
    stride: int
    dtype: jnp.dtype
    left: int = 0
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [b, t, f], zeros at padding -> [b, ceil(t / stride), features]."""
        shape = (self.width * x.shape[2], self.features)
        kernel = self.param("kernel", layers.uniform_fan_in(1.0), shape, jnp.float32)
        windows = patches(x, self.width, self.stride, self.left).astype(self.dtype)
        out = product(windows, kernel.astype(self.dtype))
        if not self.bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        return out + bias.astype(self.dtype)


class CtcModel(nn.Module):
    """An encoder `(inputs, lengths, keys) -> (frames [b, t, d], lengths)` and an output layer."""

    encoder: nn.Module
    vocab: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, inputs: Array, lengths: Array, keys: Array | None = None
    ) -> tuple[Array, Array]:
        """Scores of tokens, float32 [b, t, vocab], and true frames, int32 [b]."""
        encode: Any = self.encoder
        x, lengths = encode(inputs, lengths, keys)
        return dense(self.vocab, self.dtype, "output")(x).astype(jnp.float32), lengths


def grouped_convolution(x: Array, kernel: Array) -> Array:
    """A convolution over time of groups of features, wide, with as many frames out as in.

    out[:, i] = sum_j x[:, i + j - width // 2] kernel[j], of each group, a few taps at a time: all
    windows at once would take `width` times the memory of x, also of the backward pass.

    Args:
      x: [b, t, d], zeros at padding. kernel: [width, groups, d / groups, out / groups].

    Returns:
      [b, t, out], float32.
    """
    width, groups, inputs, outputs = kernel.shape
    b, t, _ = x.shape
    parts = -(-width // _TAPS)
    taps = jnp.pad(kernel, ((0, parts * _TAPS - width), (0, 0), (0, 0), (0, 0)))
    taps = taps.reshape(parts, _TAPS, groups, inputs, outputs).transpose(0, 2, 1, 3, 4)
    taps = taps.reshape(parts, groups, _TAPS * inputs, outputs)
    left = width // 2
    padded = jnp.pad(x, ((0, 0), (left, parts * _TAPS - left), (0, 0)))

    @jax.checkpoint
    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        start, matrices = part
        near = jax.lax.dynamic_slice_in_dim(padded, start, t + _TAPS - 1, 1)
        near = near.reshape(b, t + _TAPS - 1, groups, inputs)
        windows = jnp.concatenate([near[:, j : j + t] for j in range(_TAPS)], axis=-1)
        return total + jnp.einsum("btgi,gio->btgo", windows, matrices), None

    zeros = jnp.zeros((b, t, groups, outputs), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, (_TAPS * jnp.arange(parts), taps))
    return total.reshape(b, t, groups * outputs)
