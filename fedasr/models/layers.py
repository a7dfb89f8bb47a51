"""Building blocks whose result never depends on padding, on `fedasr.kernels`.

Activations are [batch, time, features]. Randomness comes as one key per utterance and is drawn with
time as the leading axis: JAX's counter-based generator then gives an utterance the same numbers
however far it is padded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from fedasr.errors import UserError
from fedasr.fields import check_dataclass
from fedasr.generators import is_hashed
from fedasr.kernels import attention as attentions
from fedasr.kernels import attention_accelerated, devices, norm_accelerated
from fedasr.kernels.dense import product
from fedasr.kernels.frontend import Affine, affine_product, patches

# Of whatever is a size: more is a slip, and would not end in an error but in no memory.
_SIZES = ("vocab", "features", "dim", "mlp", "units", "joint_dim", "prediction_dim", "heads")
KEPT = "kept"  # the name of what a block keeps for its backward pass, on accelerators


def check_options(config: Any, sizes: Sequence[str]) -> None:
    """Checks what the models' configurations have in common.

    Args:
      config: has `dtype`, `remat`, `attention` and the fields named by `sizes`, which must be at
        least 1.

    Raises:
      UserError: a size below 1, an unknown dtype, `remat` or `attention`.
    """
    check_numbers(config)
    check_sizes(config, sizes)
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"the model's dtype must be float32, bfloat16 or float16: {config.dtype!r}")
    if config.remat not in ("none", "block"):
        raise UserError(f"the model's remat must be 'none' or 'block': {config.remat!r}")
    if config.attention not in ("plain", "fused"):
        raise UserError(f"the model's attention must be 'plain' or 'fused': {config.attention!r}")


def check_numbers(config: Any) -> None:
    """Raises UserError for a field of another type, one that is not finite, negative or huge.

    Dropout must be below 1; a layer may be dropped always.
    """
    check_dataclass(
        config,
        "the model's",
        dict.fromkeys(_SIZES, (0, 65_536)) | {"blocks": (0, 1000), "layers": (0, 1000)},
    )
    config.check_generator()
    if getattr(config, "dropout", 0) >= 1:
        raise UserError(f"the model's dropout={config.dropout} must be below 1")
    if getattr(config, "layer_drop", 0) > 1:
        raise UserError(f"the model's layer_drop={config.layer_drop} must be at most 1")


def check_sizes(config: Any, sizes: Sequence[str]) -> None:
    """Raises UserError if a field of `config` named by `sizes` is below 1."""
    if small := [name for name in sizes if getattr(config, name) < 1]:
        raise UserError(f"the model's {', '.join(small)} must be at least 1")


def uniform_fan_in(scale: float = 1.0 / 3.0) -> nn.initializers.Initializer:
    """Uniform variance scaling over fan-in: U(-a, a), a = sqrt(3 scale / fan_in)."""
    return nn.initializers.variance_scaling(scale, "fan_in", "uniform")


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    """U(-a, a), a = 1 / sqrt(fan_in)."""
    most = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -most, most)

    return init


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
    return jnp.where(_kept(x.shape, rate, keys), x / (1.0 - rate), jnp.zeros_like(x))


def _kept(shape: tuple[int, ...], rate: float, keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - rate, shape[1:]))(keys)


def sinusoidal_positions(positions: jax.Array, features: int) -> jax.Array:
    """Sines and cosines of real-valued positions [b, t] -> float32 [b, t, features].

    Frequencies fall geometrically from 1 to 1e-4 radians per unit (Vaswani et al., 2017).
    """
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
    angles = positions[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotary(x: jax.Array) -> jax.Array:
    """Rotates queries or keys by angles that grow with their frame (RoFormer, arXiv 2104.09864).

    The product of a rotated query and a rotated key depends on the distance of their frames, not
    on where they are.

    Args:
      x: [b, t, heads, e], e even. Feature i turns with feature e/2 + i.

    Returns:
      The same shape and dtype; computed in float32.
    """
    frames = jnp.arange(x.shape[1], dtype=jnp.float32)
    sines = sinusoidal_positions(frames[:, None], x.shape[-1])  # [t, 1, e]
    sin, cos = jnp.split(sines, 2, axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _promote(inputs: Any, kernel: Any, bias: Any, **options: Any) -> Any:
    """flax's promotion to one dtype, of the parts of a `LowRank`, and but for narrow matrices.

    `product` widens these.
    """
    leaves, treedef = jax.tree.flatten((kernel, bias))
    inputs, *wide = promote_dtype(inputs, *leaves, **options)

    def chosen(old: jax.Array, new: jax.Array) -> jax.Array:
        return old if (old.ndim, old.dtype, new.dtype) == (2, jnp.bfloat16, jnp.float32) else new

    return inputs, *jax.tree.unflatten(treedef, list(map(chosen, leaves, wide)))


class Dense(nn.Dense):
    """flax's dense layer on `product`; the kernel may be a `fedasr.kernels.low_rank.LowRank`."""

    dot_general: Callable[..., jax.Array] = lambda x, kernel, *_, **__: product(x, kernel)
    promote_dtype: Callable[..., Any] = _promote


def bias_free(features: int, dtype: jnp.dtype, name: str) -> Dense:
    """A dense layer of a block: without biases, computed in `dtype`."""
    return Dense(features, use_bias=False, kernel_init=uniform_fan_in(), dtype=dtype, name=name)


class SumNorm(nn.Module):
    """A sum and its layer norm, with the parameters of `nn.LayerNorm`, as accelerators compute it.

    In place of these there may be what `norm_accelerated.factors` makes of them, under `FACTORS`.
    dtype: of the norm.
    """

    dtype: jnp.dtype
    FACTORS: ClassVar[str] = "factors"

    @nn.compact
    def __call__(
        self, x: jax.Array, branch: jax.Array | None, keep: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """[b, t, d] each, None for zeros -> x + branch in x's dtype, and its norm.

        keep: float32 scalar, factor of the branch; None for 1.
        """
        keep = jnp.ones(()) if keep is None else keep
        if (factors := self._factors(x.shape[-1])) is None:
            return norm_accelerated.plain_add_norm(self.dtype, x, branch, keep, *self._vectors())
        return norm_accelerated.add_norm(self.dtype, False, x, branch, keep, factors)

    def alone(self, x: jax.Array) -> jax.Array:
        """The norm of [b, t, d]."""
        if (factors := self._factors(x.shape[-1])) is None:
            return self(x, None)[1]
        return norm_accelerated.norm(self.dtype, False, x, factors)

    def _vectors(self) -> tuple[jax.Array, jax.Array]:
        scale: jax.Array = self.get_variable("params", "scale")
        bias: jax.Array = self.get_variable("params", "bias")
        return scale, bias

    def _factors(self, features: int) -> norm_accelerated.Factors | None:
        """For the kernel; None where there is none."""
        found: norm_accelerated.Factors | None = self.get_variable("params", self.FACTORS)
        if found is None and norm_accelerated.fits(devices.platform(), features):
            return norm_accelerated.factors(*self._vectors())
        return found


class MaskedNorm(nn.Module):
    """Zero mean and unit variance over the true frames of each utterance, scalar scale and bias."""

    epsilon: float = 1e-5

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """x: float32 [b, t, f]; lengths: int32 [b] -> float32 [b, t, f], zeros at padding."""
        return self.affine(x, lengths).array()

    def affine(self, x: jax.Array, lengths: jax.Array) -> Affine:
        """The same before scale and bias, for `WindowedDense.of_normed`."""
        scale, bias = self.parameters()
        mask = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        count = jnp.maximum(lengths * x.shape[2], 1)[:, None, None]
        mean = jnp.sum(jnp.where(mask, x, 0.0), axis=(1, 2), keepdims=True) / count
        centred = jnp.where(mask, x - mean, 0.0)
        variance = jnp.sum(centred**2, axis=(1, 2), keepdims=True) / count
        return Affine(centred * jax.lax.rsqrt(variance + self.epsilon), mask, scale, bias)

    @nn.compact
    def parameters(self) -> tuple[jax.Array, jax.Array]:
        """Scale and bias, scalars."""
        scale = self.param("scale", nn.initializers.ones, ())
        return scale, self.param("bias", nn.initializers.zeros, ())


class WindowedDense(nn.Module):
    """A dense layer on windows of frames: a strided 1-D convolution.

    features: its units. width, stride, left: of the windows, in frames (see `patches`). dtype: of
    the compute. kernel_scale: see `uniform_fan_in`. bias_drawn: whether the bias begins as
    `uniform_bias`, not as zeros.
    """

    features: int
    width: int
    stride: int
    dtype: jnp.dtype = jnp.dtype("float32")
    left: int | None = None
    kernel_scale: float = 1.0 / 3.0
    bias_drawn: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [b, t, f], zeros at padding -> [b, ceil(t / stride), features]."""
        kernel, bias = self.parameters(x.shape[2])
        windows = patches(x, self.width, self.stride, self.left).astype(self.dtype)
        return product(windows, kernel.astype(self.dtype)) + bias.astype(self.dtype)

    def of_normed(self, x: Affine) -> jax.Array:
        """The same of `MaskedNorm.affine`, in float32: cheaper where only parameters learn.

        Windows are centred (`left` None).
        """
        kernel, bias = self.parameters(x.normed.shape[2])
        return affine_product(x, kernel, self.stride) + bias

    @nn.compact
    def parameters(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """Kernel [width * inputs, features] and bias [features]."""
        shape = (self.width * inputs, self.features)
        bias = uniform_bias(shape[0]) if self.bias_drawn else nn.initializers.zeros
        kernel = self.param("kernel", uniform_fan_in(self.kernel_scale), shape, jnp.float32)
        return kernel, self.param("bias", bias, shape[1:], jnp.float32)


class InputLayer(nn.Module):
    """An affine map of the features that begins as the identity.

    As a client's own (see `fedasr.federated.local`) it makes one speaker's, microphone's or
    recording day's features like another's: the day layers of brain-to-text decoders (Willett et
    al., 2023) for anybody.
    """

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """x: float [b, t, f]; lengths: int32 [b]. Padding frames come out as zeros."""
        size = x.shape[2]
        kernel = self.param("kernel", lambda key: jnp.eye(size))
        bias = self.param("bias", nn.initializers.zeros, (size,))
        mask = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        return jnp.where(mask, product(x, kernel) + bias, 0.0)


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases; padding frames are never attended to.

    Without keys, sequences beyond `attention.LONG` frames are computed by `long_attention`.

    rotary_positions: whether scores depend on the distance between frames (see `rotary`).
    fused: see `attention.fused_attention`; no attention weight is then dropped.
    """

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.dtype("float32")
    rotary_positions: bool = False
    fused: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x: [b, t, d]; mask: bool [b, t], True for true frames, or these int [b]; keys: [b]."""
        b, t, d = x.shape
        qkv = bias_free(3 * d, self.dtype, "qkv")(x)
        if plan := self._plan(t, d, keys):
            # For a TPU the product again costs less than what its kernels read being copied.
            qkv = checkpoint_name(qkv, KEPT) if plan.kind == "gpu" else qkv
            words = jnp.zeros((b, 2), jnp.uint32)
            if plan.rate and keys is not None:
                words = jax.random.key_data(keys)
            lengths = mask if mask.ndim == 1 else jnp.sum(mask, axis=1, dtype=jnp.int32)
            out = attention_accelerated.attention(plan, qkv, lengths, words)
            return bias_free(d, self.dtype, "out")(out)
        mask = jnp.arange(t) < mask[:, None] if mask.ndim == 1 else mask
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, self.heads, d // self.heads), 2, 0)
        if self.rotary_positions:
            q, k = rotary(q), rotary(k)
        last = bias_free(d, self.dtype, "out")
        long = keys is None and t > attentions.LONG
        if self.fused:
            return last(attentions.fused_attention(q, k, v, mask, long).reshape(b, t, d))
        if long:
            return last(attentions.long_attention(q, k, v, mask).reshape(b, t, d))
        factors = None
        if self.dropout and keys is not None:
            # One key per (utterance, query frame), so that neither time axis's padding matters.
            frames = jnp.arange(t)
            keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(frames))(keys)
            draw = jax.vmap(lambda k: dropout(jnp.ones((1, t, self.heads)), self.dropout, k[None]))
            kept = jax.vmap(draw)(keys)[:, :, 0]
            factors = jnp.transpose(kept, (0, 3, 1, 2))
        return last(attentions.attention(q, k, v, mask, factors).reshape(b, t, d))

    def _plan(self, t: int, d: int, keys: jax.Array | None) -> attention_accelerated.Plan | None:
        """Of the kernel that computes this; None where there is none."""
        kind = devices.platform()
        rate = self.dropout if keys is not None else 0.0
        drawn = not rate or (keys is not None and is_hashed(keys))
        if self.fused or self.rotary_positions or not drawn:
            return None
        if not attention_accelerated.fits(kind, t, d, self.heads):
            return None
        return attention_accelerated.Plan(kind, self.heads, rate)


class FeedForward(nn.Module):
    """Two bias-free dense layers around an activation, ReLU if not told otherwise."""

    hidden: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.dtype("float32")
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu

    @nn.compact
    def __call__(
        self, x: jax.Array, keys: jax.Array | None, keep: jax.Array | None = None
    ) -> jax.Array:
        """x: [b, t, d] -> [b, t, d]; keys: [b] or None. keep: float scalar; where 0, zeros."""
        hidden = bias_free(self.hidden, self.dtype, "up")(x)
        down = bias_free(x.shape[-1], self.dtype, "down")
        if devices.platform() and self.activation is jax.nn.relu:
            kept = jnp.ones((), bool) if keep is None else keep > 0
            rate = self.dropout if keys is not None else 0.0
            if rate and keys is not None:
                kept &= _kept(hidden.shape, rate, keys)
            return down(_relu_dropout(rate, hidden, kept))
        return down(dropout(self.activation(hidden), self.dropout, keys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _relu_dropout(rate: float, x: jax.Array, kept: jax.Array) -> jax.Array:
    """dropout(relu(x)), whose derivative follows from what comes out: no mask is kept."""
    # x > 0 would be a mask of its own to a TPU's compiler, which packs its bits and writes them.
    return jnp.where(kept, jnp.maximum(x, 0) / (1.0 - rate), jnp.zeros_like(x))


def _relu_dropout_forward(rate: float, x: jax.Array, kept: jax.Array) -> Any:
    out = checkpoint_name(_relu_dropout(rate, x, kept), KEPT)
    return out, out


def _relu_dropout_backward(rate: float, out: jax.Array, gradient: jax.Array) -> Any:
    return jnp.where(out > 0, gradient / (1.0 - rate), jnp.zeros_like(gradient)), None


_relu_dropout.defvjp(_relu_dropout_forward, _relu_dropout_backward)
