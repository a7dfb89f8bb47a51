"""Layer norms and the sums before them for accelerators.

On a GPU in Pallas, one launch each way. XLA computes a layer norm by several: sums over features,
what follows from them, the normalised values, and back the sums over frames. Here a kernel has some
rows whole. Sums over rows, the gradients of scale and bias, leave it in `PARTS` parts, as the
gradient of zeros that come in beside them (`Factors`): it is `factors` that sums them, once for all
blocks. On a TPU, whose compiler joins such sums with the products before them, means and deviations
are kept for the backward pass.

For programs whose devices are divided by hand, see `devices.platform`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from fedasr.kernels.one_batch import by_client

KEPT = ("norm",)  # names of what the backward pass needs, for `jax.checkpoint`'s policies
PARTS = 64  # of the rows
_ROWS = 8  # at once
EPSILON = 1e-5

Block = Any  # a reference to a block of an array


def fits(kind: str, features: int) -> bool:
    """Whether there is a kernel."""
    return kind == "gpu" and features % 16 == 0 and features <= 2048


class Factors(NamedTuple):
    """A norm's scale and bias as its kernel takes them, see `factors`.

    values: float32 [..., 2, d], without a gradient. parts: [..., PARTS, 2, d], zeros, whose
    gradient is that of scale and bias.
    """

    values: jax.Array
    parts: jax.Array


def factors(scale: jax.Array, bias: jax.Array) -> Factors:
    """Scale and bias [..., d] for `add_norm`."""
    values, parts = _divided(scale, bias)
    return Factors(jax.lax.stop_gradient(values), parts)


@jax.custom_vjp
def _divided(scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = jnp.stack([scale, bias], axis=-2)
    return values, jnp.zeros((*values.shape[:-2], PARTS, *values.shape[-2:]), values.dtype)


def _joined(_: None, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    sums = jnp.sum(gradients[1], axis=-3)
    return sums[..., 0, :], sums[..., 1, :]


_divided.defvjp(lambda scale, bias: (_divided(scale, bias), None), _joined)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm(dtype: Any, interpret: bool, x: jax.Array, given: Factors) -> jax.Array:
    """The second of what `add_norm` gives, without a branch."""
    return _forward_alone(dtype, interpret, x, given)[0]


def _forward_alone(dtype: Any, interpret: bool, x: jax.Array, given: Factors) -> Any:
    (_, out), saved = _forward(dtype, interpret, x, None, jnp.ones(()), given)
    return out, saved


def _backward_alone(dtype: Any, interpret: bool, saved: Any, gradient: Any) -> Any:
    found, _, _, by_given = _backward(dtype, interpret, saved, (None, gradient))
    return found, by_given


norm.defvjp(_forward_alone, _backward_alone)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_norm(
    dtype: Any,
    interpret: bool,
    x: jax.Array,
    branch: jax.Array | None,
    keep: jax.Array,
    given: Factors,
) -> tuple[jax.Array, jax.Array]:
    """x + keep * branch, and its layer norm over features with an epsilon of 1e-5, in float32.

    Args:
      dtype: of the norm that comes out. interpret: on the CPU, for tests.
      x: [..., d]. branch: [..., d] of any float dtype; None for zeros. keep: float32, a scalar that
        has no gradient.
      given: of `factors`, for scale and bias [d].

    Returns:
      [..., d] in x's dtype, and [..., d] in `dtype`.
    """
    return _forward(dtype, interpret, x, branch, keep, given)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def plain_add_norm(
    dtype: Any,
    x: jax.Array,
    branch: jax.Array | None,
    keep: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The same as XLA computes it; scale, bias: float32 [d]."""
    return _plain_forward(dtype, x, branch, keep, scale, bias)[0]


def _plain_forward(
    dtype: Any, x: jax.Array, branch: Any, keep: jax.Array, scale: Any, bias: Any
) -> Any:
    total = x
    if branch is not None:
        total = checkpoint_name((x + branch * keep).astype(x.dtype), KEPT[0])
    wide = total.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1)
    variance = jnp.maximum(jnp.mean(wide * wide, axis=-1) - mean * mean, 0.0)
    mean = checkpoint_name(mean, KEPT[0])
    inverse = checkpoint_name(jax.lax.rsqrt(variance + EPSILON), KEPT[0])
    out = (wide - mean[..., None]) * (inverse[..., None] * scale) + bias
    saved = total, None if branch is None else branch[:0], keep, scale, mean, inverse
    return (total, out.astype(dtype)), saved


def _plain_backward(dtype: Any, saved: Any, gradients: Any) -> Any:
    del dtype
    total, branch, keep, scale, mean, inverse = saved
    direct, by_norm = gradients
    slopes = by_norm.astype(jnp.float32)
    normed = (total.astype(jnp.float32) - mean[..., None]) * inverse[..., None]
    scaled = slopes * scale
    along = jnp.mean(scaled * normed, axis=-1, keepdims=True)
    found = (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normed * along) * inverse[
        ..., None
    ]
    found = direct + found.astype(direct.dtype)
    rows = tuple(range(slopes.ndim - 1))
    by_branch = None if branch is None else (found * keep).astype(branch.dtype)
    return found, by_branch, None, jnp.sum(slopes * normed, axis=rows), jnp.sum(slopes, axis=rows)


plain_add_norm.defvjp(_plain_forward, _plain_backward)


def _forward(
    dtype: Any, interpret: bool, x: jax.Array, branch: Any, keep: jax.Array, given: Factors
) -> Any:
    wide = (x,) if branch is None else (x, branch)
    kernel = _forwards_kernel if branch is None else _forwards_kernel_of_sum
    dtypes = (dtype,) if branch is None else (x.dtype, dtype)
    call = functools.partial(_call, kernel, "norm_forwards", interpret, len(wide), dtypes, False)
    found = by_client(call)(*(_rows(a) for a in wide), keep.reshape(1), given.values)
    out = tuple(checkpoint_name(a.reshape(x.shape), KEPT[0]) for a in found)
    out = (x, *out) if branch is None else out
    return out, (out[0], None if branch is None else branch[:0], keep, given.values)


def _backward(dtype: Any, interpret: bool, saved: Any, gradients: Any) -> Any:
    total, branch, keep, values = saved
    direct, by_norm = gradients
    dtypes = (total.dtype,) if branch is None else (total.dtype, branch.dtype)
    arrays = [a for a in (total, by_norm, direct) if a is not None]
    kernel = functools.partial(_backwards_kernel, len(arrays))
    call = functools.partial(_call, kernel, "norm_backwards", interpret, len(arrays), dtypes, True)
    wide = (_rows(a) for a in arrays)
    *found, parts = by_client(call)(*wide, keep.reshape(1), values)
    found = [a.reshape(total.shape) for a in found]
    return (
        found[0],
        None if branch is None else found[1],
        None,
        Factors(jnp.zeros_like(values), parts),
    )


add_norm.defvjp(_forward, _backward)


def _rows(x: jax.Array) -> jax.Array:
    """[rows, d]."""
    return x.reshape(-1, x.shape[-1])


def _call(
    kernel: Any, name: str, interpret: bool, wide: int, dtypes: tuple[Any, ...], sums: bool,
    *args: jax.Array,
) -> Any:  # fmt: skip
    """args: `wide` arrays [clients, rows, d], keep [clients, 1], scale and bias [clients, 2, d]."""
    from jax.experimental.pallas import triton as plgpu  # a release of JAX may lack it

    clients, rows, d = args[0].shape
    of_rows = pl.BlockSpec((None, rows, d), lambda i, _: (i, 0, 0))
    shapes = [jax.ShapeDtypeStruct((clients, rows, d), dtype) for dtype in dtypes]
    specs = [of_rows] * len(shapes)
    if sums:
        shapes.append(jax.ShapeDtypeStruct((clients, PARTS, 2, d), jnp.float32))
        specs.append(pl.BlockSpec((None, None, 2, d), lambda i, part: (i, part, 0, 0)))
    return pl.pallas_call(
        functools.partial(kernel, (rows, d, -(-rows // (PARTS * _ROWS)))),
        grid=(clients, PARTS),
        in_specs=[of_rows] * wide
        + [
            pl.BlockSpec((None, 1), lambda i, _: (i, 0)),
            pl.BlockSpec((None, 2, d), lambda i, _: (i, 0, 0)),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )(*args)


def _places(d: int) -> list[tuple[int, int]]:
    """Powers of two that the features are the sum of: beginnings and sizes."""
    found, begin = [], 0
    while begin < d:
        size = 1 << ((d - begin).bit_length() - 1)
        found.append((begin, size))
        begin += size
    return found


class _Rows:
    """Some rows of arrays in pieces of features, with zeros beyond either end."""

    def __init__(self, sizes: tuple[int, int, int], part: Any, turn: Any) -> None:
        self.rows, self.d, turns = sizes
        self.start = (part * turns + turn) * _ROWS

    def _inside(self, size: int) -> Any:
        rows = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, size), 0) + self.start
        return rows < self.rows

    def load(self, x: Block) -> list[jax.Array]:
        from jax.experimental.pallas import triton as plgpu

        return [
            plgpu.load(
                x.at[pl.ds(self.start, _ROWS), pl.ds(begin, size)],
                mask=self._inside(size),
                other=0.0,
            ).astype(jnp.float32)
            for begin, size in _places(self.d)
        ]

    def store(self, x: Block, values: list[jax.Array]) -> None:
        from jax.experimental.pallas import triton as plgpu

        for (begin, size), value in zip(_places(self.d), values, strict=True):
            plgpu.store(
                x.at[pl.ds(self.start, _ROWS), pl.ds(begin, size)],
                value.astype(x.dtype),
                mask=self._inside(size),
            )

    def normed(self, x: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        """Normalised rows, and 1 / their standard deviation [rows]."""
        mean = self.mean(x)
        centred = [part - mean[:, None] for part in x]
        inverse = jax.lax.rsqrt(self.mean([part * part for part in centred]) + EPSILON)
        return [part * inverse[:, None] for part in centred], inverse

    def mean(self, x: list[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.add, [jnp.sum(part, axis=1) for part in x]) / self.d


def _vector(values: Block, row: int, d: int) -> list[jax.Array]:
    """A row of [2, d], scale or bias, piece by piece."""
    return [values[pl.ds(row, 1), pl.ds(begin, size)] for begin, size in _places(d)]


def _forwards_kernel(
    sizes: tuple[int, int, int], x: Block, keep: Block, values: Block, out: Block
) -> None:
    _normalise(sizes, (x,), keep, None, values, out)


def _forwards_kernel_of_sum(
    sizes: tuple[int, int, int],
    x: Block, branch: Block, keep: Block, values: Block, total: Block, out: Block,
) -> None:  # fmt: skip
    _normalise(sizes, (x, branch), keep, total, values, out)


def _normalise(
    sizes: tuple[int, int, int], terms: tuple[Block, ...], keep: Block, total: Block | None,
    values: Block, out: Block,
) -> None:  # fmt: skip
    scales, biases = _vector(values, 0, sizes[1]), _vector(values, 1, sizes[1])
    part = pl.program_id(1)

    def turn(number: jax.Array, nothing: jax.Array) -> jax.Array:
        at = _Rows(sizes, part, number)
        x = at.load(terms[0])
        if total is not None:
            x = [a + b * keep[0] for a, b in zip(x, at.load(terms[1]), strict=True)]
            x = [a.astype(total.dtype).astype(jnp.float32) for a in x]
            at.store(total, x)
        normed, _ = at.normed(x)
        at.store(out, [a * s + b for a, s, b in zip(normed, scales, biases, strict=True)])
        return nothing

    jax.lax.fori_loop(0, sizes[2], turn, jnp.int32(0))


def _backwards_kernel(wide: int, sizes: tuple[int, int, int], *blocks: Block) -> None:
    """blocks: x, the norm's gradient and, if `wide` is 3, the sum's; keep; values; results."""
    x, by_norm, *direct = blocks[:wide]
    keep, values, *into, by_values = blocks[wide:]
    d, part = sizes[1], pl.program_id(1)
    scales = _vector(values, 0, d)

    def turn(number: jax.Array, sums: Any) -> Any:
        at = _Rows(sizes, part, number)
        normed, inverse = at.normed(at.load(x))
        slopes = at.load(by_norm)
        scaled = [a * s for a, s in zip(slopes, scales, strict=True)]
        mean = at.mean(scaled)
        along = at.mean([a * b for a, b in zip(scaled, normed, strict=True)])
        found = [
            (a - mean[:, None] - b * along[:, None]) * inverse[:, None]
            for a, b in zip(scaled, normed, strict=True)
        ]
        for array in direct:
            found = [a + b for a, b in zip(at.load(array), found, strict=True)]
        at.store(into[0], found)
        for array in into[1:]:  # the branch's
            at.store(array, [a * keep[0] for a in found])
        by_scales, by_biases = sums
        by_scales = [
            a + jnp.sum(b * c, axis=0, keepdims=True)
            for a, b, c in zip(by_scales, slopes, normed, strict=True)
        ]
        return by_scales, [
            a + jnp.sum(b, axis=0, keepdims=True) for a, b in zip(by_biases, slopes, strict=True)
        ]

    nothing = [jnp.zeros_like(s) for s in scales]
    for row, sums in enumerate(jax.lax.fori_loop(0, sizes[2], turn, (nothing, nothing))):
        for (begin, size), value in zip(_places(d), sums, strict=True):
            by_values[pl.ds(row, 1), pl.ds(begin, size)] = value
