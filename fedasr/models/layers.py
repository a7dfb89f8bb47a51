"""Building blocks whose result never depends on padding.

Activations are [batch, time, features]. Randomness comes as one key per utterance and is drawn with
time as the leading axis: JAX's counter-based generator then gives an utterance the same numbers
however far it is padded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.fields import check_dataclass

# Of whatever is a size: more is a slip, and would not end in an error but in no memory.
_SIZES = ("vocab", "features", "dim", "mlp", "units", "joint_dim", "prediction_dim", "heads")
BLOCK = "block_"  # how the names of an encoder's blocks begin


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
    if getattr(config, "dropout", 0) >= 1:
        raise UserError(f"the model's dropout={config.dropout} must be below 1")
    if getattr(config, "layer_drop", 0) > 1:
        raise UserError(f"the model's layer_drop={config.layer_drop} must be at most 1")


def check_sizes(config: Any, sizes: Sequence[str]) -> None:
    """Raises UserError if a field of `config` named by `sizes` is below 1."""
    if small := [name for name in sizes if getattr(config, name) < 1]:
        raise UserError(f"the model's {', '.join(small)} must be at least 1")


def checkpoint(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Gradient checkpointing: the backward pass computes `function` again (arXiv 1604.06174).

    Only the arguments are kept, at the price of a second forward pass. That is what
    `jax.checkpoint` does, too, but XLA drops its barriers on CPUs, merges both passes and saves
    nothing. Here what is computed again depends on the incoming gradient, so that no compiler can
    do it earlier, or only once.

    Args:
      function: (params, x, *rest) -> array. Gradients flow to the floats of `params`, any pytree,
        and to `x`, not to the rest.

    Returns:
      The same function, with equal gradients up to the order of float operations.
    """

    @jax.custom_vjp
    def wrapped(params, x, *rest):
        return function(params, x, *rest)

    def forward(params, x, *rest):
        # Else what parameters alone decide, such as their conversion to another dtype, may be
        # computed for all blocks beforehand.
        return function(after(x, params), x, *rest), (params, x, *rest)

    def backward(args, gradient):
        params, x, *rest = after(gradient, args)
        _, pull = jax.vjp(lambda p, x: function(p, x, *rest), params, x)
        return *pull(gradient), *[None] * len(rest)

    wrapped.defvjp(forward, backward)
    return wrapped


def after(known: jax.Array, tree: Any) -> Any:
    """The tree as it is, but so that nothing can be computed from it before `known` is there.

    Where the first element of `known` is not finite it is all zeros: for use where what is not
    finite comes out as not finite in any case.
    """
    first = known.ravel()[0]
    usual = first <= jnp.finfo(first.dtype).max
    return jax.tree.map(lambda a: jnp.where(usual, a, jnp.zeros_like(a)), tree)


class LazyParameter:
    """A parameter that a device keeps in another form until the moment of its use.

    Subclasses are pytrees. Blocks make arrays of theirs themselves, within `checkpoint` where it is
    on; `realise` is for the rest.
    """

    def array(self) -> jax.Array:
        """The parameter as the model uses it."""
        raise NotImplementedError


def is_lazy(x: Any) -> bool:
    """Whether x is a `LazyParameter`."""
    return isinstance(x, LazyParameter)


def realise(params: Any) -> Any:
    """The tree with an array in place of every `LazyParameter`."""
    return jax.tree.map(lambda x: x.array() if is_lazy(x) else x, params, is_leaf=is_lazy)


def realise_outside_blocks(params: Any) -> Any:
    """`realise` for all of a model's parameters but its blocks'."""
    if not isinstance(params, dict):
        return realise(params)
    return {k: v if k.startswith(BLOCK) else realise_outside_blocks(v) for k, v in params.items()}


def apply_block(block: nn.Module, remat: str, x: jax.Array, *rest: Any) -> jax.Array:
    """block(x, *rest), with `checkpoint` around it where `remat` is "block".

    Args:
      block: a submodule of the module that is being called, its name begins with `BLOCK`.
      remat: "none" or "block"; parameters, their paths, outputs and random numbers are the same.
      x: [b, t, d]. rest: arrays, keys or None.
    """
    if block.is_initializing():
        return block(x, *rest)
    params = block.variables["params"]
    if remat == "none" and not any(map(is_lazy, jax.tree.leaves(params, is_leaf=is_lazy))):
        return block(x, *rest)
    alone = block.clone(parent=None)

    def function(params, *args):
        return alone.apply({"params": realise(params)}, *args)

    return (function if remat == "none" else checkpoint(function))(params, x, *rest)


def drop_block(
    new: jax.Array, old: jax.Array, rate: float, keys: jax.Array | None, index: int
) -> jax.Array:
    """Layer drop: a block's output `new`, or with probability `rate` its input `old`.

    One draw for the whole batch, without rescaling. The batch's first utterance draws for all:
    padding utterances come last.

    Args:
      new, old: [b, t, d]. keys: the block's [b], or None for evaluation. index: of the stream of
        the block's keys to draw from; those below it are the block's own.
    """
    if not rate or keys is None:
        return new
    keep = jax.random.bernoulli(jax.random.fold_in(keys[0], index), 1.0 - rate)
    return jnp.where(keep, new, old)


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
    b, t, f = x.shape
    out, left = -(-t // stride), (width - 1) // 2
    rows = out + -(-width // stride) - 1  # of `stride` frames side by side
    right = rows * stride - left - t
    padded = jnp.pad(x[:, : t + min(right, 0)], ((0, 0), (left, max(right, 0)), (0, 0)))
    blocks = padded.reshape(b, rows, stride * f)
    views = [blocks[:, i : i + out, : (width - i * stride) * f] for i in range(-(-width // stride))]
    return jnp.concatenate(views, axis=-1)


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


@jax.custom_vjp
def depthwise_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution over time, each feature with its own filter ("same" padding by zeros).

    out[:, i] = sum_j x[:, i + j - (width - 1) // 2] * kernel[j], as a sum over shifted inputs.
    Under a vmap over clients `lax.conv` becomes a grouped convolution with clients x features
    groups, which took 70 times as long on a CPU (width 32, forward and backward). The derivatives
    are written out for the same reason: automatic ones pad and add an array for every tap (4 to 7
    times as long, 13 times the memory).

    Args:
      x: [b, t, d], zero beyond each utterance's length.
      kernel: [width, d].

    Returns:
      [b, t, d] in x's dtype; sums are float32.
    """
    left = (kernel.shape[0] - 1) // 2
    return _shifted_sum(x, kernel, left)


def _shifted_sum(x: jax.Array, kernel: jax.Array, left: int) -> jax.Array:
    width, frames = kernel.shape[0], x.shape[1]
    padded = _padded(x, left, width)
    taps = [padded[:, j : j + frames] * kernel[j].astype(jnp.float32) for j in range(width)]
    return sum(taps).astype(x.dtype)


def _padded(x: jax.Array, left: int, width: int) -> jax.Array:
    """x as float32 with `left` zero frames before it and width - 1 in all."""
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (left, width - 1 - left), (0, 0)))


def _depthwise_forward(x, kernel):
    return depthwise_convolution(x, kernel), (x, kernel)


def _depthwise_backward(saved, gradient):
    x, kernel = saved
    width, frames = kernel.shape[0], x.shape[1]
    left = (width - 1) // 2
    padded, float_gradient = _padded(x, left, width), gradient.astype(jnp.float32)

    def tap(j):
        return jnp.sum(
            jax.lax.dynamic_slice_in_dim(padded, j, frames, 1) * float_gradient, axis=(0, 1)
        )

    # One tap after the other: side by side they would each hold a copy of the input.
    kernel_gradient = jax.lax.map(tap, jnp.arange(width)).astype(kernel.dtype)
    return _shifted_sum(gradient, kernel[::-1], width - 1 - left), kernel_gradient


depthwise_convolution.defvjp(_depthwise_forward, _depthwise_backward)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel for a matrix that all of x shares: [..., f] and [f, g] -> [..., g].

    The derivative by the kernel is written as a product over rows. JAX's own is the transpose of a
    product, for which XLA copies an operand on CPUs: it took 1.9 times as long, a whole training
    step 8% longer.
    """
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _product_backward(saved, gradient):
    x, kernel = saved
    by_x = jax.lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, gradient)]
    by_kernel = jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def affine_product(
    windows: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    normed: jax.Array,
    mask: jax.Array,
    stride: int,
) -> jax.Array:
    """windows @ kernel of patches of normed * scale + bias: [b, o, w f] -> [b, o, g].

    No gradient goes to the windows: those of the two scalars follow from the product's, since both
    move all windows alike. That saves a product and the patches' transpose, a sixth of a step of a
    small model; not where clients are vmapped, each with a scale of its own: both ways are then
    computed. Where the scale is near zero the windows say too little of what was scaled, and the
    scalars' gradients are computed from `normed`.

    Args:
      windows: `patches` of the following, [b, o, w f]. kernel: [w f, g].
      scale, bias: scalars.
      normed: [b, t, f], zero at padding frames, from which `patches(normed * scale + bias * mask)`
        are the windows.
      mask: [b, o, w], 1 where a window's frame is a true one, 0 where it is padding.
      stride: of the patches.
    """
    return product(windows, kernel)


_NEAR_ZERO = 0.1  # of a scale, to divide by


def _affine_product_forward(windows, kernel, scale, bias, normed, mask, stride):
    out = product(windows, kernel)
    return out, (windows, kernel, scale, bias, normed, mask, out)


def _affine_product_backward(stride, saved, gradient):
    windows, kernel, scale, bias, normed, mask, out = saved
    _, by_kernel = _product_backward((windows, kernel), gradient)
    width, features = mask.shape[-1], normed.shape[-1]
    sums = kernel.reshape(width, features, -1).sum(axis=1)
    by_bias = jnp.sum(jnp.einsum("bow,bog->wg", mask, gradient) * sums)

    def from_out():  # <out, gradient> = scale * by_scale + bias * by_bias
        return (jnp.sum(out * gradient) - bias * by_bias) / scale

    def from_normed():
        by_window = jax.lax.dot_general(gradient, kernel, (((2,), (1,)), ((), ())))
        return jnp.sum(by_window * patches(normed, width, stride))

    by_scale = jax.lax.cond(jnp.abs(scale) > _NEAR_ZERO, from_out, from_normed)
    return None, by_kernel, by_scale, by_bias, None, None


affine_product.defvjp(_affine_product_forward, _affine_product_backward)


class Dense(nn.Dense):
    """flax's dense layer on `product`."""

    dot_general: Callable[..., jax.Array] = lambda x, kernel, *_, **__: product(x, kernel)


class MaskedNorm(nn.Module):
    """Zero mean and unit variance over the true frames of each utterance, scalar scale and bias."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, parts: bool = False) -> Any:
        """Normalises.

        Args:
          x: float32 [b, t, f]. lengths: int32 [b].
          parts: whether what `affine_product` needs is wanted, too.

        Returns:
          float32 [b, t, f], zeros at padding frames; with `parts` (that, the same before scale and
          bias, bool [b, t, 1] of true frames, scale, bias).
        """
        scale = self.param("scale", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, ())
        mask = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        count = jnp.maximum(lengths * x.shape[2], 1)[:, None, None]
        mean = jnp.sum(jnp.where(mask, x, 0.0), axis=(1, 2), keepdims=True) / count
        centred = jnp.where(mask, x - mean, 0.0)
        variance = jnp.sum(centred**2, axis=(1, 2), keepdims=True) / count
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        out = jnp.where(mask, normed * scale + bias, 0.0)
        return (out, normed, mask, scale, bias) if parts else out


def front_end_product(
    out: jax.Array,
    normed: jax.Array,
    mask: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    width: int,
    stride: int,
) -> tuple[jax.Array, Callable[..., jax.Array]]:
    """Patches of a `MaskedNorm`'s output, and the product for a `Dense` on them.

    Args:
      out, normed, mask, scale, bias: of `MaskedNorm(...)(x, lengths, parts=True)`, of features that
        need no gradient. width, stride: of the patches.
    """
    windows = jax.lax.stop_gradient(patches(out, width, stride))
    inside = patches(mask.astype(jnp.float32), width, stride)

    def windows_product(x, kernel, *_, **__):
        return affine_product(x, kernel, scale, bias, normed, inside, stride)

    return windows, windows_product


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


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """JAX's own attention, without dropout of weights.

    On a GPU in half precision it is cuDNN's flash attention, which never has all scores [b, heads,
    t, t] in memory; elsewhere XLA's, which has.

    Args:
      q, k, v: [b, t, heads, e]. mask: bool [b, t], True for each utterance's true frames, which
        come first.

    Returns:
      [b, t, heads, e].
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)  # never nothing to attend to
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if half and jax.default_backend() == "gpu" else "xla",
    )


@jax.custom_vjp
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, kept: jax.Array | None
) -> jax.Array:
    """Attention with dropout of weights, by way of all scores.

    The derivative by the scores needs, for every query, the mean of the weights' derivatives: as
    the product of the output and its derivative it is a sum over features, not over all frames
    (FlashAttention, arXiv 2205.14135), which saves 4% of a step of a small model. In half precision
    and on accelerators, which round float32 products, it is taken over frames.

    Args:
      q, k, v: [b, t, heads, e]. mask: bool [b, t], True for true frames.
      kept: float32 [b, heads, t, t], factors of the weights, see `dropout`; None for 1.

    Returns:
      [b, t, heads, e] in v's dtype; the weights are computed in float32.
    """
    return _attention_forward(q, k, v, mask, kept)[0]


def _attention_forward(q, k, v, mask, kept):
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None, :], scores.astype(jnp.float32), -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    used = (weights if kept is None else weights * kept).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhe->bqhe", used, v)
    return out, (q, k, v, mask, weights, kept, out)


def _attention_backward(saved, gradient):
    q, k, v, mask, weights, kept, out = saved
    used = (weights if kept is None else weights * kept).astype(v.dtype)
    by_v = jnp.einsum("bhqk,bqhe->bkhe", used, gradient)
    by_used = jnp.einsum("bqhe,bkhe->bhqk", gradient, v).astype(jnp.float32)
    by_weights = by_used if kept is None else by_used * kept
    if v.dtype == jnp.float32 and jax.default_backend() == "cpu":
        mean = jnp.moveaxis(jnp.sum(out * gradient, axis=-1), 1, 2)[..., None]
    else:  # products are rounded, the output unlike the weights' derivatives, which must cancel
        mean = jnp.sum(weights * by_weights, axis=-1, keepdims=True)
    by_scores = weights * (by_weights - mean)
    by_scores = jnp.where(mask[:, None, None, :], by_scores, 0.0).astype(q.dtype)
    by_scores = by_scores * q.shape[-1] ** -0.5
    by_q = jnp.einsum("bhqk,bkhe->bqhe", by_scores, k)
    by_k = jnp.einsum("bhqk,bqhe->bkhe", by_scores, q)
    return by_q, by_k, by_v, None, None


attention.defvjp(_attention_forward, _attention_backward)


LONG = 1024  # frames; beyond, evaluation has not all scores [t, t] in memory at once
_QUERIES = 256  # at a time, there


def long_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attention` of some queries after others: memory grows with t, not with its square.

    Args and returns: as `attention`, without dropout.
    """
    b, t, heads, e = q.shape
    blocks = -(-t // _QUERIES)
    padded = jnp.pad(q, ((0, 0), (0, blocks * _QUERIES - t), (0, 0), (0, 0)))
    parts = jnp.moveaxis(padded.reshape(b, blocks, _QUERIES, heads, e), 1, 0)
    out = jax.lax.map(lambda part: attention(part, k, v, mask, None), parts)
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, heads, e)[:, :t]


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases; padding frames are never attended to.

    Without keys, sequences beyond `LONG` frames are computed by `long_attention`.

    rotary_positions: whether scores depend on the distance between frames (see `rotary`).
    fused: see `fused_attention`; no attention weight is then dropped.
    """

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    rotary_positions: bool = False
    fused: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x: [b, t, d]; mask: bool [b, t], True for true frames; keys: [b] or None."""
        b, t, d = x.shape
        qkv = Dense(
            3 * d, use_bias=False, kernel_init=uniform_fan_in(), dtype=self.dtype, name="qkv"
        )(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, self.heads, d // self.heads), 2, 0)
        if self.rotary_positions:
            q, k = rotary(q), rotary(k)
        last = Dense(d, use_bias=False, kernel_init=uniform_fan_in(), dtype=self.dtype, name="out")
        flash = self.fused and jax.default_backend() == "gpu"
        if keys is None and t > LONG and not flash:
            return last(long_attention(q, k, v, mask).reshape(b, t, d))
        if self.fused:
            return last(fused_attention(q, k, v, mask).reshape(b, t, d))
        factors = None
        if self.dropout and keys is not None:
            # One key per (utterance, query frame), so that neither time axis's padding matters.
            frames = jnp.arange(t)
            keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(frames))(keys)
            draw = jax.vmap(lambda k: dropout(jnp.ones((1, t, self.heads)), self.dropout, k[None]))
            kept = jax.vmap(draw)(keys)[:, :, 0]
            factors = jnp.transpose(kept, (0, 3, 1, 2))
        return last(attention(q, k, v, mask, factors).reshape(b, t, d))


class FeedForward(nn.Module):
    """Two bias-free dense layers around an activation, ReLU if not told otherwise."""

    hidden: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """x: [b, t, d] -> [b, t, d]; keys: [b] or None."""
        options = {"use_bias": False, "kernel_init": uniform_fan_in(), "dtype": self.dtype}
        hidden = self.activation(Dense(self.hidden, name="up", **options)(x))
        return Dense(x.shape[-1], name="down", **options)(dropout(hidden, self.dropout, keys))
