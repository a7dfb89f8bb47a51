"""A Transformer's front end on a TPU, in one kernel each way, in Pallas.

Features normalised over an utterance, their windows' product with a matrix, and the gated linear
unit of that: what these write and read again one after another is several times their features and
matrix. A kernel has an utterance in the chip's fast memory. The backward pass has all again from
the features. Values are those of `layers.MaskedNorm`, `layers.WindowedDense` and `jax.nn.glu`.

For programs whose devices are divided by hand, see `devices.platform`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedasr.kernels.attention_accelerated import dot
from fedasr.kernels.frontend import Affine, patches
from fedasr.kernels.one_batch import by_client

EPSILON = 1e-5  # of the norm
_FRAMES = 16  # in a row of a TPU's registers of bfloat16
_FEATURES = 128  # at most: windows are read some frames apart, which wider arrays cannot be
_WIDTH = 16  # at most, of windows: a kernel has each of their places written out
_VMEM = 64 << 20
_MOST = 40 << 20  # of it that arrays are known to take

Block = Any  # a reference to a block of an array


class Plan(NamedTuple):
    """What is static: windows of `width` frames, the first of them `left` frames before the start.

    dtype: of the compute. interpret: on the CPU, for tests.
    """

    width: int
    stride: int
    left: int
    dtype: Any
    interpret: bool = False

    def windows(self, frames: int) -> int:
        """How many there are of so many frames."""
        return -(-frames // self.stride)


class Weights(NamedTuple):
    """Scale and bias of the norm [2], and of the windows' product matrix [w f, 2 d] and bias [2 d].

    float32.
    """

    affine: jax.Array
    kernel: jax.Array
    bias: jax.Array


def fits(kind: str, plan: Plan, weights: Weights, frames: int, features: int) -> bool:
    """Whether there is a kernel for such weights, and so many frames of so many features."""
    plain = all(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in weights)
    if kind != "tpu" or not plain or features > _FEATURES or plan.width > _WIDTH:
        return False
    if jnp.dtype(plan.dtype) not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return False
    (inputs, units), windows = weights.kernel.shape[-2:], plan.windows(frames)
    rows = 6 * _tiled(frames, features) + 3 * _tiled(windows, inputs) + 8 * _tiled(windows, units)
    rows += plan.width * _tiled(windows, features)  # the frames of a place, each by itself
    # The matrix twice, the next client's being on its way; its sum, and as many derivatives.
    return 4 * (5 * _tiled(inputs, units) + rows) <= _MOST


def _tiled(rows: int, columns: int) -> int:
    """Numbers that an array takes with those that fill up its tiles."""
    return -(-rows // 8) * 8 * (-(-columns // 128) * 128)


def gated(plan: Plan, weights: Weights, features: jax.Array, lengths: jax.Array) -> jax.Array:
    """glu(windows(norm(features)) @ kernel + bias), which can be differentiated once.

    Args:
      plan: static.
      weights: of one client.
      features: float [b, t, f]; what lies beyond `lengths` does not matter.
      lengths: int [b], true frames.

    Returns:
      [b, ceil(t / stride), d] of the plan's dtype.
    """
    return _gated(plan, *weights, features.astype(jnp.float32), lengths.astype(jnp.int32))


def reference(plan: Plan, weights: Weights, features: jax.Array, lengths: jax.Array) -> jax.Array:
    """What the kernels compute, by the operations that everybody has."""
    mask = (jnp.arange(features.shape[1]) < lengths[:, None])[..., None]
    count = jnp.maximum(lengths * features.shape[2], 1)[:, None, None]
    mean = jnp.sum(jnp.where(mask, features, 0.0), axis=(1, 2), keepdims=True) / count
    centred = jnp.where(mask, features - mean, 0.0)
    variance = jnp.sum(centred**2, axis=(1, 2), keepdims=True) / count
    normed = Affine(centred * jax.lax.rsqrt(variance + EPSILON), mask, *weights.affine).array()
    windows = patches(normed, plan.width, plan.stride, plan.left).astype(plan.dtype)
    kernel, bias = weights.kernel.astype(plan.dtype), weights.bias.astype(plan.dtype)
    return jax.nn.glu(windows @ kernel + bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(plan: Plan, *args: jax.Array) -> jax.Array:
    return _computed(plan, *args)


def _computed(plan: Plan, *args: jax.Array) -> jax.Array:
    *weights, features, lengths = args
    found: jax.Array = by_client(functools.partial(_forwards, plan), len(weights))(
        lengths, features, *weights
    )
    return found


class _Saved(NamedTuple):
    """For the backward pass: () where the features', or the matrix's, derivative is wanted."""

    args: tuple[jax.Array, ...]
    by_features: tuple[()] | None
    by_matrix: tuple[()] | None


def _forward(plan: Plan, *args: CustomVJPPrimal) -> tuple[jax.Array, _Saved]:
    values = tuple(arg.value for arg in args)
    wanted = (() if args[place].perturbed else None for place in (-2, 1))
    return _computed(plan, *values), _Saved(values, *wanted)


def _backward(plan: Plan, saved: _Saved, gradient: Any) -> tuple[Any, ...]:
    *weights, features, lengths = saved.args
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros(gradient.shape, gradient.dtype)
    if saved.by_features is not None:  # by an attack; not in training

        def of(features: jax.Array, *weights: jax.Array) -> jax.Array:
            return reference(plan, Weights(*weights), features, lengths)

        by_features, *by_weights = jax.vjp(of, features, *weights)[1](gradient)
        return *by_weights, by_features, None
    frozen = saved.by_matrix is None
    call = by_client(functools.partial(_backwards, plan, frozen), len(weights))
    by_affine, by_bias, *by_matrix = call(lengths, features, gradient, *weights)
    return jnp.sum(by_affine, axis=1), None if frozen else by_matrix[0], by_bias, None, None


_gated.defvjp(_forward, _backward, symbolic_zeros=True)


def _forwards(plan: Plan, lengths: jax.Array, features: jax.Array, *weights: jax.Array) -> Any:
    """Of clients [c, ...]."""
    windows = plan.windows(features.shape[2])
    shape = *features.shape[:2], _whole(windows), weights[1].shape[-1] // 2
    out_shape = [jax.ShapeDtypeStruct(shape, plan.dtype)]
    (out,) = _call(plan, _forwards_kernel, lengths, (features,), weights, out_shape)
    return out[:, :, :windows]


def _backwards(
    plan: Plan, frozen: bool, lengths: jax.Array, features: jax.Array, gradient: jax.Array,
    *weights: jax.Array,
) -> list[jax.Array]:  # fmt: skip
    """Derivatives by scale and bias, [c, 2, f] in parts, by the product's bias and its matrix.

    By the matrix if that is not frozen.
    """
    windows = gradient.shape[2]
    gap = (0, _whole(windows) - windows)
    gradient = jnp.pad(gradient, ((0, 0), (0, 0), gap, (0, 0)))
    c, inputs, units = features.shape[0], *weights[1].shape[-2:]
    shapes = [(c, 2, features.shape[3]), (c, 1, units), (c, inputs, units)]
    out_shape = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes[: 2 if frozen else 3]]
    found = _call(plan, _backwards_kernel, lengths, (features, gradient), weights, out_shape)
    return [found[0], found[1][:, 0], *found[2:]]


def _whole(windows: int) -> int:
    return -(-windows // _FRAMES) * _FRAMES


def _call(
    plan: Plan, kernel: Callable[..., None], lengths: jax.Array, rows: tuple[jax.Array, ...],
    weights: tuple[jax.Array, ...], out_shape: list[Any],
) -> list[jax.Array]:  # fmt: skip
    """A kernel for each utterance of each client.

    Args:
      lengths: [c, b]. rows: [c, b, ...] each. weights: [c, ...], or [1, ...] where clients share
        them. out_shape: of [c, b, ...], or else of each client's sums.
    """
    c, b, t, f = rows[0].shape
    of_sums = len(rows) > 1
    inputs, units = weights[1].shape[-2:]
    affine, matrix, bias = weights
    whole = _whole(plan.windows(t))
    long = max(plan.left + t, (whole - 1) * plan.stride + plan.width)

    def of_utterance(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j: (i, j, 0, 0))

    def of_client(x: Any, space: Any = None) -> pl.BlockSpec:
        of_all = x.shape[0] == 1
        block = (None, *x.shape[1:])
        return pl.BlockSpec(block, lambda i, j: (0 if of_all else i, 0, 0), memory_space=space)

    told = lengths.reshape(c * b, 1, 1)
    given = [affine[:, None], matrix, bias[:, None]]
    scratch = [pltpu.VMEM((long, f), jnp.float32), pltpu.VMEM((whole, inputs), plan.dtype)]
    if of_sums:
        scratch += [pltpu.VMEM((whole, units), plan.dtype)]
    moved = sum(x.size * x.dtype.itemsize for x in (*rows, *weights, *out_shape))
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(c, b),
        in_specs=[
            pl.BlockSpec((None, 1, 1), lambda i, j: (i * b + j, 0, 0), memory_space=pltpu.SMEM),
            *map(of_utterance, rows),
            of_client(given[0], pltpu.SMEM),
            *map(of_client, given[1:]),
        ],
        out_specs=[*map(of_client if of_sums else of_utterance, out_shape)],
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * c * b * whole * inputs * units * (len(out_shape) if of_sums else 1),
            bytes_accessed=moved,
            transcendentals=c * b * whole * units // 2,
        ),
        interpret=plan.interpret,
        name="front_end_backwards" if of_sums else "front_end_forwards",
    )(told, *rows, *given)


class _Utterance(NamedTuple):
    """An utterance as its norm leaves it, in memory, and scale and bias of that."""

    plan: Plan
    length: jax.Array
    normed: Block  # from `left` frames before its start, zeros where there is none
    scale: jax.Array
    bias: jax.Array

    def frames(self, place: int, windows: int) -> tuple[jax.Array, jax.Array]:
        """The frames at a place of all windows, normed [o, f], and which are true, [o, f]."""
        stride = self.plan.stride
        found = self.normed[pl.ds(place, windows, stride), :]
        frame = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0) * stride
        frame += place - self.plan.left
        return found, (frame >= 0) & (frame < self.length)


def _read(
    plan: Plan, length: Block, features: Block, affine: Block, normed: Block, windows: Block
) -> _Utterance:
    """Norms an utterance, and has its windows. normed, windows: written."""
    x, n = features[...], length[0, 0]
    t, f = x.shape
    true = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < n
    share = 1.0 / jnp.maximum(n * f, 1).astype(jnp.float32)
    centred = jnp.where(true, x - jnp.sum(jnp.where(true, x, 0.0)) * share, 0.0)
    deviation = jax.lax.rsqrt(jnp.sum(centred * centred) * share + EPSILON)
    normed[...] = jnp.zeros_like(normed)
    normed[plan.left : plan.left + t, :] = centred * deviation
    at = _Utterance(plan, n, normed, affine[0, 0], affine[0, 1])
    for place in range(plan.width):
        frames, inside = at.frames(place, windows.shape[0])
        scaled = jnp.where(inside, frames * at.scale + at.bias, 0.0)
        windows[:, place * f : (place + 1) * f] = scaled.astype(plan.dtype)
    return at


def _halves(plan: Plan, windows: Block, matrix: Block, bias: Block) -> tuple[jax.Array, jax.Array]:
    """What is gated, and what gates it before the sigmoid, [o, d] float32."""
    found = dot(windows[...], matrix[...].astype(plan.dtype), (1, 0)) + bias[...]
    d = found.shape[1] // 2
    return found[:, :d], found[:, d:]


def _forwards_kernel(
    plan: Plan, length: Block, features: Block, affine: Block, matrix: Block, bias: Block,
    out: Block, normed: Block, windows: Block,
) -> None:  # fmt: skip
    _read(plan, length, features, affine, normed, windows)
    value, gate = _halves(plan, windows, matrix, bias)
    out[...] = (value * jax.nn.sigmoid(gate)).astype(out.dtype)


def _backwards_kernel(
    plan: Plan, length: Block, features: Block, gradient: Block, affine: Block, matrix: Block,
    bias: Block, by_affine: Block, by_bias: Block, *blocks: Block,
) -> None:  # fmt: skip
    *by_matrix, normed, windows, slopes = blocks
    at = _read(plan, length, features, affine, normed, windows)
    value, gate = _halves(plan, windows, matrix, bias)
    (o, d), f = value.shape, features.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for total in (by_affine, by_bias, *by_matrix):
            total[...] = jnp.zeros_like(total)

    by_out, share = gradient[...].astype(jnp.float32), jax.nn.sigmoid(gate)
    by_value, by_gate = by_out * share, by_out * value * share * (1.0 - share)
    slopes[:, :d], slopes[:, d:] = (x.astype(slopes.dtype) for x in (by_value, by_gate))
    for total in by_matrix:
        total[...] += dot(windows[...], slopes[...], (0, 0))
    by_bias[:, :d] += jnp.sum(by_value, axis=0, keepdims=True)
    by_bias[:, d:] += jnp.sum(by_gate, axis=0, keepdims=True)
    by_windows = dot(slopes[...], matrix[...].astype(plan.dtype), (1, 1))
    for place in range(plan.width):
        frames, inside = at.frames(place, o)
        by_frames = jnp.where(inside, by_windows[:, place * f : (place + 1) * f], 0.0)
        by_affine[:1, :] += jnp.sum(by_frames * frames, axis=0, keepdims=True)
        by_affine[1:, :] += jnp.sum(by_frames, axis=0, keepdims=True)
