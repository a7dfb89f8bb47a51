"""Attention of several heads over one utterance's frames: three ways to compute it.

Shapes are those of `jax.nn.dot_product_attention`: queries, keys and values [b, t, heads, e].
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from fedasr.errors import pass_exhaustion

LONG = 1024  # frames; beyond, evaluation has not all scores [t, t] in memory at once
_QUERIES = 256  # at a time, there
_NEVER = -1e30  # the score of padding

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]


def reference(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, kept: jax.Array | None = None
) -> jax.Array:
    """What `attention` computes (Vaswani et al., 2017, equation 1), without its derivative."""
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, _NEVER), axis=-1)
    weights = weights if kept is None else weights * kept
    return jnp.einsum("bhqk,bkhe->bqhe", weights.astype(v.dtype), v)


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
      kept: float32 [b, heads, t, t], factors of the weights, see `layers.dropout`; None for 1.

    Returns:
      [b, t, heads, e] in v's dtype; the weights are computed in float32.
    """
    return _forward(q, k, v, mask, kept)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, kept: jax.Array | None
) -> tuple[jax.Array, Saved]:
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = jnp.where(mask[:, None, None, :], scores, _NEVER)
    weights = jax.nn.softmax(scores, axis=-1)
    used = (weights if kept is None else weights * kept).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhe->bqhe", used, v)
    return out, (q, k, v, mask, weights, kept, out)


def _backward(
    saved: Saved, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    q, k, v, mask, weights, kept, out = saved
    used = (weights if kept is None else weights * kept).astype(v.dtype)
    by_v = jnp.einsum("bhqk,bqhe->bkhe", used, gradient)
    by_used = jnp.einsum("bqhe,bkhe->bhqk", gradient, v).astype(weights.dtype)
    by_weights = by_used if kept is None else by_used * kept
    if v.dtype == weights.dtype:
        mean = jax.lax.platform_dependent(
            out, gradient, weights, by_weights, cpu=_mean_by_output, default=_mean_by_weights
        )
    else:
        mean = _mean_by_weights(out, gradient, weights, by_weights)
    by_scores = weights * (by_weights - mean)
    by_scores = jnp.where(mask[:, None, None, :], by_scores, 0.0).astype(q.dtype)
    by_scores = by_scores * q.shape[-1] ** -0.5
    by_q = jnp.einsum("bhqk,bkhe->bqhe", by_scores, k)
    by_k = jnp.einsum("bhqk,bqhe->bkhe", by_scores, q)
    return by_q, by_k, by_v, None, None if kept is None else by_used * weights


def _mean_by_output(
    out: jax.Array, gradient: jax.Array, weights: jax.Array, by_weights: jax.Array
) -> jax.Array:
    """The mean, for each query, of the weights' derivatives: [b, heads, t, 1]."""
    del weights, by_weights
    with jax.named_scope("attention_mean_by_output"):
        return jnp.moveaxis(jnp.sum(out * gradient, axis=-1), 1, 2)[..., None]


def _mean_by_weights(
    out: jax.Array, gradient: jax.Array, weights: jax.Array, by_weights: jax.Array
) -> jax.Array:
    """The same where products are rounded: the output's rounding would not cancel."""
    del out, gradient
    with jax.named_scope("attention_mean_by_weights"):
        return jnp.sum(weights * by_weights, axis=-1, keepdims=True)


attention.defvjp(_forward, _backward)


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


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, by_blocks: bool = False
) -> jax.Array:
    """JAX's own attention, without dropout of weights.

    In half precision, programs for CUDA hold cuDNN's flash attention, which never has all scores
    [b, heads, t, t] in memory. JAX writes its calls by the version of cuDNN, and for the sizes that
    cuDNN takes: where it cannot, compiling for CUDA warns, and XLA's attention, which has all
    scores, is there as it is elsewhere.

    Args:
      q, k, v: [b, t, heads, e]. mask: bool [b, t], True for each utterance's true frames, which
        come first.
      by_blocks: whether what is not cuDNN's should be `long_attention`.

    Returns:
      [b, t, heads, e].
    """
    elsewhere = long_attention if by_blocks else _xla
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return elsewhere(q, k, v, mask)
    reason = _why_not_cudnn(q, k, v, mask)
    cuda = functools.partial(_instead, elsewhere, reason) if reason else _cudnn
    return jax.lax.platform_dependent(q, k, v, mask, cuda=cuda, default=elsewhere)


def _lengths(mask: jax.Array) -> jax.Array:
    """int32 [b], at least 1: there is never nothing to attend to."""
    return jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=_lengths(mask), implementation="xla"
    )


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    frames = q.shape[1]
    # For training JAX refuses odd numbers of frames.
    q, k, v = (jnp.pad(x, ((0, 0), (0, frames % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=_lengths(mask), implementation="cudnn"
    )
    return out[:, :frames]


def _why_not_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> str:
    """Why JAX cannot write calls of cuDNN for these arrays on this machine; empty where it can."""

    def trained(*args: jax.Array) -> jax.Array:
        return jax.vjp(lambda q, k, v: _cudnn(q, k, v, mask), *args)[0]

    try:
        jax.eval_shape(trained, q, k, v)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pass_exhaustion(error, "preparing attention")  # or bits would follow from the memory
        return str(error) or type(error).__name__
    return ""


def _instead(
    function: Callable[..., jax.Array], reason: str, q: Any, k: Any, v: Any, mask: jax.Array
) -> jax.Array:
    """function(q, k, v, mask), and a warning once this is compiled."""
    return function(q, k, v, mask ^ _without_cudnn.bind(reason=reason))


# Every branch of `platform_dependent` is traced, but only what is compiled for may warn.
_without_cudnn = Primitive("fedasr_without_cudnn")


@_without_cudnn.def_abstract_eval
def _without_cudnn_type(*, reason: str) -> jax.core.ShapedArray:
    del reason
    return jax.core.ShapedArray((), jnp.bool_.dtype)


def _warn(ctx: Any, *, reason: str) -> Any:
    warnings.warn(
        f"fused attention is compiled for CUDA without cuDNN's, and takes the memory of all "
        f"scores: {reason}",
        stacklevel=2,
    )
    return mlir.lower_fun(lambda: jnp.bool_(False), multiple_results=False)(ctx)


mlir.register_lowering(_without_cudnn, _warn)
