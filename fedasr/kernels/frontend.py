"""Windows of frames, and their product with a matrix where the frames were just normalised."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from fedasr.kernels.dense import by_input, by_kernel, product
from fedasr.kernels.low_rank import LowRank, plain

_NEAR_ZERO = 0.1  # of a scale, to divide by


def patches(x: jax.Array, width: int, stride: int, left: int | None = None) -> jax.Array:
    """Windows of frames, so that a dense layer acts as a strided 1-D convolution.

    A convolution with per-client kernels would lower to a slow grouped convolution under vmap.

    Args:
      x: [b, t, f], zero beyond each utterance's length.
      left: frames of window i before frame i * stride; None for those that centre it there.

    Returns:
      [b, ceil(t / stride), width * f].
    """
    b, t, f = x.shape
    out, left = -(-t // stride), (width - 1) // 2 if left is None else left
    rows = out + -(-width // stride) - 1  # of `stride` frames side by side
    right = rows * stride - left - t
    padded = jnp.pad(x[:, : t + min(right, 0)], ((0, 0), (left, max(right, 0)), (0, 0)))
    blocks = padded.reshape(b, rows, stride * f)
    views = [blocks[:, i : i + out, : (width - i * stride) * f] for i in range(-(-width // stride))]
    return jnp.concatenate(views, axis=-1)


def patches_reference(x: jax.Array, width: int, stride: int) -> jax.Array:
    """What `patches` computes, window by window."""
    t, left = x.shape[1], (width - 1) // 2
    frames = jnp.pad(x, ((0, 0), (left, width), (0, 0)))
    windows = [frames[:, i : i + width].reshape(len(x), -1) for i in range(0, t, stride)]
    return jnp.stack(windows, axis=1)


class Affine(NamedTuple):
    """`where(mask, normed * scale + bias, 0)`, not yet computed.

    normed: float [b, t, f], normalised frames, zero at padding. mask: bool [b, t, 1], True for true
    frames. scale, bias: scalars.
    """

    normed: jax.Array
    mask: jax.Array
    scale: jax.Array
    bias: jax.Array

    def array(self) -> jax.Array:
        """float [b, t, f]."""
        return jnp.where(self.mask, self.normed * self.scale + self.bias, 0.0)


def reference(x: Affine, kernel: jax.Array, stride: int) -> jax.Array:
    """What `affine_product` computes."""
    width = kernel.shape[0] // x.normed.shape[2]
    return patches_reference(x.array(), width, stride) @ kernel


def affine_product(x: Affine, kernel: jax.Array | LowRank, stride: int) -> jax.Array:
    """patches(x) @ kernel for normalised frames: [b, t, f] and [width f, g] -> [b, o, g].

    Where nobody asks for the gradient of the frames, as in training, those of the two scalars
    follow on a CPU from the product's, since both move all windows alike. That saves a product and
    the patches' transpose, a sixth of a step of a small model; not on accelerators, where clients
    are vmapped, each with a scale of its own: both ways below would then be computed. Where the
    scale is near zero the windows say too little of what was scaled, and the scalars' gradients are
    computed as usual.

    Args:
      x: of `layers.MaskedNorm`. kernel: [width * f, g]. stride: of the patches.
    """
    return _affine_product(stride, *x, plain(kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine_product(
    stride: int,
    normed: jax.Array,
    mask: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    return product(_windows(stride, Affine(normed, mask, scale, bias), kernel), kernel)


def _windows(stride: int, x: Affine, kernel: jax.Array) -> jax.Array:
    return patches(x.array(), kernel.shape[0] // x.normed.shape[2], stride)


class _Saved(NamedTuple):
    """For the backward pass. by_frames: () where the frames' gradient is wanted, else None."""

    x: Affine
    kernel: jax.Array
    windows: jax.Array
    out: jax.Array
    by_frames: tuple[()] | None


def _forward(stride: int, *args: CustomVJPPrimal) -> tuple[jax.Array, _Saved]:
    *parts, kernel = (arg.value for arg in args)
    x = Affine(*parts)
    windows = _windows(stride, x, kernel)
    out = product(windows, kernel)
    return out, _Saved(x, kernel, windows, out, () if args[0].perturbed else None)


def _backward(stride: int, saved: _Saved, gradient: Any) -> tuple[Any, ...]:
    x, kernel, windows, out, by_frames = saved
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros(gradient.shape, gradient.dtype)
    to_kernel = by_kernel(windows, gradient).astype(kernel.dtype)
    if by_frames is not None:
        by_normed, by_scale, by_bias = _plainly(stride, x, kernel, out, gradient)
        return by_normed, None, by_scale, by_bias, to_kernel

    def plainly(*args: Any) -> tuple[jax.Array, jax.Array]:
        return _plainly(stride, *args)[1:]

    by_scale, by_bias = jax.lax.platform_dependent(
        x, kernel, out, gradient, cpu=functools.partial(_from_product, stride), default=plainly
    )
    return None, None, by_scale, by_bias, to_kernel


def _plainly(
    stride: int, x: Affine, kernel: jax.Array, out: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the frames and the two scalars, by way of the windows' gradient."""
    del out

    def windows(normed: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return _windows(stride, Affine(normed, x.mask, scale, bias), kernel)

    with jax.named_scope("front_end_plainly"):
        pull = jax.vjp(windows, x.normed, x.scale, x.bias)[1]
        return pull(by_input(gradient, kernel).astype(x.normed.dtype))


def _from_product(
    stride: int, x: Affine, kernel: jax.Array, out: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the two scalars: <out, gradient> = scale * by_scale + bias * by_bias."""
    width = kernel.shape[0] // x.normed.shape[2]
    inside = patches(x.mask.astype(gradient.dtype), width, stride)
    sums = kernel.reshape(width, x.normed.shape[2], -1).sum(axis=1)

    def from_out() -> jax.Array:
        return (jnp.sum(out * gradient) - x.bias * by_bias) / x.scale

    def from_normed() -> jax.Array:
        return jnp.sum(by_input(gradient, kernel) * patches(x.normed, width, stride))

    with jax.named_scope("front_end_from_product"):
        by_bias = jnp.sum(jnp.einsum("bow,bog->wg", inside, gradient) * sums)
        by_scale = jax.lax.cond(jnp.abs(x.scale) > _NEAR_ZERO, from_out, from_normed)
    return by_scale, by_bias


_affine_product.defvjp(_forward, _backward, symbolic_zeros=True)
