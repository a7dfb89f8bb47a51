"""A Transformer's block of clients side by side on a TPU, in one kernel each way, in Pallas.

A client's matrices are small there: what a block's operations one after another write and read
again is most of what moves. A kernel has one utterance and its client's matrices in the chip's fast
memory; only what goes into a block is kept, and the backward pass has the rest again. Values, and
what dropout draws of hashed keys, are those of the operations of `fedasr.models.transformer.Block`.

For programs whose devices are divided by hand, see `devices.platform`.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedasr import generators
from fedasr.kernels import attention_accelerated as attention
from fedasr.kernels import norm_accelerated
from fedasr.kernels.one_batch import by_client

_FRAMES = 16  # in a row of a TPU's registers of bfloat16
_LONGEST = 512  # frames: a kernel has all scores of a head
_VMEM = 64 << 20
_MOST = 40 << 20  # of it that arrays are known to take
_WORDS = 4  # keys of an utterance: attention, its branch, feed-forward, its branch
_GIVEN = 2 + 2 * _WORDS  # numbers that a kernel is told of an utterance
_NORM_1, _NORM_2 = slice(0, 2), slice(2, 4)  # rows of scale and bias

Block = Any  # a reference to a block of an array


class Plan(NamedTuple):
    """What is static of a block.

    heads; dtype: of the compute. rate, branch_rate: of dropout within the branches, and of what
    comes out of them. interpret: on the CPU, for tests.
    """

    heads: int
    dtype: Any
    rate: float
    branch_rate: float
    interpret: bool = False

    @property
    def drops(self) -> bool:
        """Whether there is any dropout."""
        return bool(self.rate or self.branch_rate)


class Weights(NamedTuple):
    """Scale and bias of both norms [4, d], and matrices [d, 3d], [d, d], [d, m] and [d, m].

    The last is transposed: long rows have less that fills up a TPU's tiles, in a program for one
    also where a client's parameters lie from step to step.
    """

    norms: jax.Array
    qkv: jax.Array
    out: jax.Array
    up: jax.Array
    down: jax.Array


def fits(kind: str, plan: Plan, frames: int, features: int, hidden: int) -> bool:
    """Whether there is a kernel for so many frames, and matrices between so many features."""
    if kind != "tpu" or frames > _LONGEST or (features // plan.heads) % 4:
        return False
    if jnp.dtype(plan.dtype) not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return False
    matrices = _tiled(features, 4 * features) + 2 * _tiled(features, hidden)
    rows = 16 * _tiled(frames, features) + 6 * _tiled(frames, hidden) + 6 * _tiled(frames, frames)
    # Matrices twice, the next client's being on their way, and their sums; as many of derivatives.
    return 4 * (5 * matrices + rows) <= _MOST


def _tiled(rows: int, columns: int) -> int:
    """Numbers that an array takes with those that fill up its tiles."""
    return -(-rows // 8) * 8 * (-(-columns // 128) * 128)


def weights_of(params: Any) -> Weights | None:
    """Of a block's parameters by name; None if there are others, or they are no plain arrays."""
    names = {"attention_norm": 2, "attention": 2, "mlp_norm": 2, "mlp": 2}
    leaves, _ = jax.tree.flatten(params)
    if {k: len(v) for k, v in params.items()} != names or len(leaves) != 8:
        return None
    if any(not isinstance(x, jax.Array) for x in leaves):
        return None
    first, second = params["attention_norm"], params["mlp_norm"]
    norms = jnp.stack([first["scale"], first["bias"], second["scale"], second["bias"]])
    attend, feed = params["attention"], params["mlp"]
    qkv, out = (attend[name]["kernel"] for name in ("qkv", "out"))
    return Weights(norms, qkv, out, feed["up"]["kernel"], feed["down"]["kernel"].T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block(plan: Plan, weights: Weights, x: jax.Array, given: jax.Array) -> jax.Array:
    """x + attention(norm(x)), then x + feed-forward(norm(x)); can be differentiated once.

    Args:
      plan: static.
      weights: of one client, of any float dtype.
      x: [b, t, d]. given: see `given_of`.

    Returns:
      [b, t, d] in x's dtype.
    """
    return _computed_by_kernel(plan, weights, x, given)


def given_of(lengths: jax.Array, keep: jax.Array | None, keys: Any) -> jax.Array:
    """What a kernel is told of each utterance, int32 [b, 10].

    Args:
      lengths: int [b], true frames. keep: float scalar, 0 to leave the block out; None for 1.
      keys: four hashed [b], or None without dropout.
    """
    b = lengths.shape[0]
    words = jnp.zeros((b, 2 * _WORDS), jnp.uint32)
    if keys is not None:
        words = jnp.concatenate([jax.random.key_data(key) for key in keys], axis=1)
    kept = jnp.ones((), bool) if keep is None else keep > 0
    head = [lengths.astype(jnp.int32), jnp.broadcast_to(kept.astype(jnp.int32), (b,))]
    return jnp.concatenate(
        [jnp.stack(head, axis=1), jax.lax.bitcast_convert_type(words, jnp.int32)], axis=1
    )


def reference(plan: Plan, weights: Weights, x: jax.Array, given: jax.Array) -> jax.Array:
    """What the kernels compute, by the operations that everybody has."""
    b = len(x)
    keep = given[0, 1].astype(jnp.float32)
    words = jax.lax.bitcast_convert_type(given[:, 2:], jnp.uint32).reshape(b, _WORDS, 2)
    norms, qkv, out, up, down = weights

    def kept(shape: tuple[int, ...], rate: float, which: int) -> jax.Array:
        index = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32).reshape(shape)
        return jax.vmap(lambda w: generators.kept_words(w[0], w[1], index, rate))(words[:, which])

    def dropped(x: jax.Array, rate: float, which: int) -> jax.Array:
        if not rate:
            return x
        return jnp.where(kept(x.shape[1:], rate, which), x / (1.0 - rate), jnp.zeros_like(x))

    def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return x @ matrix.astype(plan.dtype)

    within = attention.Plan("tpu", plan.heads, plan.rate)
    one = jnp.ones(())
    x, normed = norm_accelerated.plain_add_norm(plan.dtype, x, None, one, *norms[_NORM_1])
    attended = attention.reference(within, product(normed, qkv), given[:, 0], words[:, 0])
    branch = dropped(product(attended, out), plan.branch_rate, 1)
    x, normed = norm_accelerated.plain_add_norm(plan.dtype, x, branch, keep, *norms[_NORM_2])
    hidden = dropped(jax.nn.relu(product(normed, up)), plan.rate, 2) * keep.astype(plan.dtype)
    return x + dropped(product(hidden, down.T), plan.branch_rate, 3)


def _computed_by_kernel(plan: Plan, weights: Weights, x: jax.Array, given: jax.Array) -> jax.Array:
    out: jax.Array = by_client(functools.partial(_forwards, plan), len(weights))(given, x, *weights)
    return out


class _Saved(NamedTuple):
    """For the backward pass. wanted: () for weights whose derivative is, else None."""

    weights: Weights
    x: jax.Array
    given: jax.Array
    wanted: tuple[tuple[()] | None, ...]


def _forward(plan: Plan, weights: Any, x: Any, given: Any) -> tuple[jax.Array, _Saved]:
    wanted = tuple(() if w.perturbed else None for w in weights)
    saved = _Saved(Weights(*(w.value for w in weights)), x.value, given.value, wanted)
    return _computed_by_kernel(plan, *saved[:3]), saved


def _backward(plan: Plan, saved: _Saved, gradient: Any) -> tuple[Weights, jax.Array, None]:
    weights, x, given, _ = saved
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros(gradient.shape, gradient.dtype)
    wanted = tuple(place is not None for place in saved.wanted)
    call = by_client(functools.partial(_backwards, plan, wanted), len(weights))
    by_x, *found = call(given, x, gradient.astype(x.dtype), *weights)
    cast = [
        a.astype(w.dtype) for a, w in zip(found, itertools.compress(weights, wanted), strict=True)
    ]
    return Weights(*_placed(wanted, cast)), by_x, None


block.defvjp(_forward, _backward, symbolic_zeros=True)


def _placed(wanted: tuple[bool, ...], found: Sequence[Any]) -> list[Any]:
    """What there is of weights that are wanted, each in its place; None for others."""
    rest = iter(found)
    return [next(rest) if there else None for there in wanted]


def _forwards(plan: Plan, given: jax.Array, x: jax.Array, *weights: jax.Array) -> jax.Array:
    """Of clients [c, ...]."""
    (out,) = _call(plan, _forwards_kernel, "block_forwards", given, (x,), weights, None)
    return out


def _backwards(
    plan: Plan, wanted: tuple[bool, ...], given: jax.Array, x: jax.Array, gradient: jax.Array,
    *weights: jax.Array,
) -> list[jax.Array]:  # fmt: skip
    """Derivatives by x and by the weights that are wanted.

    By norms they are in float32, by matrices in the compute's dtype.
    """
    dtypes = [jnp.float32] + [plan.dtype] * 4
    by_weights = [
        jax.ShapeDtypeStruct((len(x), *w.shape[1:]), dtype) if there else None
        for w, dtype, there in zip(weights, dtypes, wanted, strict=True)
    ]
    kernel = functools.partial(_backwards_kernel, wanted)
    return _call(plan, kernel, "block_backwards", given, (x, gradient), weights, by_weights)


def _call(
    plan: Plan, kernel: Any, name: str, given: jax.Array, rows: tuple[jax.Array, ...],
    weights: tuple[jax.Array, ...], by_weights: list[Any] | None,
) -> list[jax.Array]:  # fmt: skip
    """A kernel for each utterance of each client.

    Args:
      given: int32 [c, b, 10]. rows: [c, b, t, d]. weights: [c, ...], or [1, ...] where clients
        share them. by_weights: shapes of what comes out beside [c, b, t, d], or None; None for all
        forwards.
    """
    c, b, t, d = rows[0].shape
    whole = -(-t // _FRAMES) * _FRAMES
    if whole != t:
        rows = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, whole - t), (0, 0))) for x in rows)
    hidden = weights[3].shape[2]

    # Not prefetched, which would be what all clients are told.
    told = pl.BlockSpec((None, 1, _GIVEN), lambda i, j: (i * b + j, 0, 0), memory_space=pltpu.SMEM)
    of_utterance = pl.BlockSpec((None, None, whole, d), lambda i, j: (i, j, 0, 0))

    def of_client(x: Any) -> pl.BlockSpec:
        of_all = x.shape[0] == 1
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, j: (0 if of_all else i, 0, 0))

    scratch = [pltpu.VMEM((whole, 3 * d), plan.dtype), pltpu.VMEM((whole, d), plan.dtype)]
    out_shape: list[Any] = [jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)]
    sums = [x for x in by_weights or () if x is not None]
    products = 2 * c * b * (whole * d * (4 * d + 2 * hidden) + 2 * whole * whole * d)
    if by_weights is not None:
        frozen = sum(w[0].size for w, x in zip(weights, by_weights, strict=True) if x is None)
        products = 3 * products - 2 * c * b * whole * frozen
        scratch += [pltpu.VMEM((whole, 3 * d), plan.dtype)]
        scratch += [pltpu.VMEM(x.shape[1:], jnp.float32) for x in by_weights[1:] if x is not None]
    out_shape += sums
    moved = sum(x.size * x.dtype.itemsize for x in (*rows, *weights, *out_shape))
    found = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(c, b),
        in_specs=[told, *[of_utterance] * len(rows), *map(of_client, weights)],
        out_specs=[of_utterance, *map(of_client, sums)],
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=products,
            bytes_accessed=moved,
            transcendentals=c * b * plan.heads * whole * whole,
        ),
        interpret=plan.interpret,
        name=name,
    )(given.reshape(c * b, 1, _GIVEN), *rows, *weights)
    return [found[0][:, :, :t], *found[1:]]


class _Utterance(NamedTuple):
    """What is drawn of an utterance, and whether its block is left in."""

    plan: Plan
    given: Block  # int32 [1, 10]

    def _told(self, place: int) -> jax.Array:
        found: jax.Array = self.given[0, place]
        return found

    @property
    def length(self) -> jax.Array:
        return self._told(0)

    @property
    def kept(self) -> jax.Array:
        return self._told(1) > 0

    def words(self, which: int) -> tuple[jax.Array, jax.Array]:
        first, second = (self._told(2 + 2 * which + i).astype(jnp.uint32) for i in range(2))
        return first, second

    def dropped(self, x: jax.Array, rate: float, which: int) -> jax.Array:
        """[t, n] float32, by what `fedasr.models.layers.dropout` draws."""
        if not rate:
            return x
        n = jnp.uint32(x.shape[1])
        frame, feature = (
            jax.lax.broadcasted_iota(jnp.int32, x.shape, axis).astype(jnp.uint32)
            for axis in range(2)
        )
        kept = generators.kept_words(*self.words(which), frame * n + feature, rate)
        return jnp.where(kept, x / (1.0 - rate), 0.0)

    def heads(self, t: int, d: int) -> tuple[attention.Plan, Any]:
        """How `attention_accelerated` sees it, all queries being of one turn."""
        e = d // self.plan.heads
        plan = attention.Plan("tpu", self.plan.heads, self.plan.rate)
        return plan, attention.Sizes(t, t, d, e)


class _Norm(NamedTuple):
    """A layer norm [t, d]: before and after its scale and bias, in float32."""

    hat: jax.Array
    inverse: jax.Array
    scale: jax.Array
    bias: jax.Array

    @property
    def out(self) -> jax.Array:
        return self.hat * self.scale + self.bias

    def backwards(self, slopes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The derivatives by what is normed [t, d], and by scale and bias [2, d]."""
        scaled = slopes * self.scale
        along = jnp.mean(scaled * self.hat, axis=1, keepdims=True)
        mean = jnp.mean(scaled, axis=1, keepdims=True)
        by_scale = jnp.sum(slopes * self.hat, axis=0, keepdims=True)
        by_bias = jnp.sum(slopes, axis=0, keepdims=True)
        by_x = (scaled - mean - self.hat * along) * self.inverse
        return by_x, jnp.concatenate([by_scale, by_bias], axis=0)


def _norm(x: jax.Array, vectors: jax.Array) -> _Norm:
    """Of float32 [t, d], by scale and bias [2, d]: as `norm_accelerated.plain_add_norm`."""
    mean = jnp.mean(x, axis=1, keepdims=True)
    variance = jnp.maximum(jnp.mean(x * x, axis=1, keepdims=True) - mean * mean, 0.0)
    inverse = jax.lax.rsqrt(variance + norm_accelerated.EPSILON)
    return _Norm((x - mean) * inverse, inverse, vectors[:1], vectors[1:])


class _Forwards(NamedTuple):
    """What the backward pass needs of a block; queries, keys, values and heads are in scratch."""

    first: _Norm
    second: _Norm
    total: jax.Array
    hidden: jax.Array


def _computed(at: _Utterance, x: Block, weights: Weights, qkv: Block, attended: Block) -> _Forwards:
    """An utterance as far as the last product. qkv, attended: written."""
    plan, (t, d) = at.plan, x.shape
    dtype = plan.dtype
    wide = x[...].astype(jnp.float32)
    first = _norm(wide, weights.norms[_NORM_1, :])
    qkv[...] = _product(first.out, weights.qkv, dtype).astype(dtype)
    of_heads, sizes = at.heads(t, d)
    words = at.words(0)
    for head in range(plan.heads):
        q, k, v = (qkv[:, part] for part in _parts(d, sizes.e, head))
        shares, factors, _ = attention.weights_of(of_heads, sizes, head, 0, at.length, words, q, k)
        used = shares if factors is None else shares * factors
        attended[:, head * sizes.e : (head + 1) * sizes.e] = attention.dot(
            used.astype(dtype), v, (1, 0)
        ).astype(dtype)
    branch = _rounded(_product(attended[...], weights.out, dtype), dtype)
    branch = _rounded(at.dropped(branch, plan.branch_rate, 1), dtype)
    total = _rounded(wide + jnp.where(at.kept, branch, 0.0), x.dtype)
    second = _norm(total, weights.norms[_NORM_2, :])
    hidden = _rounded(_product(second.out, weights.up, dtype), dtype)
    hidden = at.dropped(jnp.where(at.kept, jnp.maximum(hidden, 0.0), 0.0), plan.rate, 2)
    return _Forwards(first, second, total, hidden.astype(dtype))


def _parts(d: int, e: int, head: int) -> tuple[slice, ...]:
    """Of queries, keys and values side by side those of a head."""
    return tuple(slice(p * d + head * e, p * d + (head + 1) * e) for p in range(3))


def _product(x: jax.Array, matrix: Block, dtype: Any, by_columns: bool = False) -> jax.Array:
    """x @ matrix, or x @ matrix.T, of what is rounded to a dtype: float32."""
    axes = (1, 1) if by_columns else (1, 0)
    return attention.dot(x.astype(dtype), matrix[...].astype(dtype), axes)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 as it is after it was stored."""
    return x.astype(dtype).astype(jnp.float32)


def _forwards_kernel(plan: Plan, given: Block, x: Block, *blocks: Block) -> None:
    weights, (out, qkv, attended) = Weights(*blocks[:5]), blocks[5:]
    at = _Utterance(plan, given)
    found = _computed(at, x, weights, qkv, attended)
    branch = _rounded(_product(found.hidden, weights.down, plan.dtype, True), plan.dtype)
    branch = _rounded(at.dropped(branch, plan.branch_rate, 3), plan.dtype)
    out[...] = (found.total + branch).astype(out.dtype)


def _backwards_kernel(
    wanted: tuple[bool, ...], plan: Plan, given: Block, x: Block, gradient: Block, *blocks: Block
) -> None:
    weights, by_x, count = Weights(*blocks[:5]), blocks[5], 6 + sum(wanted)
    by_norms, *by_matrices = _placed(wanted, blocks[6:count])
    qkv, attended, by_qkv, *rest = blocks[count:]
    sums = _placed(wanted[1:], rest)
    number, dtype = pl.program_id(1), plan.dtype
    at = _Utterance(plan, given)

    @pl.when(number == 0)
    def _() -> None:
        for total in (by_norms, *sums):
            if total is not None:
                total[...] = jnp.zeros_like(total)

    def add(total: Block | None, rows: jax.Array, slopes: jax.Array) -> None:
        if total is not None:
            total[...] += attention.dot(rows, slopes, (0, 0))

    def add_vectors(rows: slice, vectors: jax.Array) -> None:
        if by_norms is not None:
            by_norms[rows, :] += vectors

    of_qkv, of_out, of_up, of_down = sums
    found = _computed(at, x, weights, qkv, attended)
    slopes = gradient[...].astype(jnp.float32)

    by_branch = at.dropped(_rounded(slopes, dtype), plan.branch_rate, 3).astype(dtype)
    add(of_down, by_branch, found.hidden)
    by_hidden = _rounded(_product(by_branch, weights.down, dtype), dtype)
    by_hidden = jnp.where(found.hidden.astype(jnp.float32) > 0, by_hidden / (1.0 - plan.rate), 0.0)
    by_hidden = by_hidden.astype(dtype)
    add(of_up, found.second.out.astype(dtype), by_hidden)
    by_normed = _rounded(_product(by_hidden, weights.up, dtype, True), dtype)
    by_total, by_vectors = found.second.backwards(by_normed)
    add_vectors(_NORM_2, by_vectors)
    slopes = _rounded(slopes + _rounded(by_total, x.dtype), x.dtype)

    by_branch = _rounded(jnp.where(at.kept, slopes, 0.0), dtype)
    by_branch = at.dropped(by_branch, plan.branch_rate, 1).astype(dtype)
    add(of_out, attended[...], by_branch)
    attended[...] = _product(by_branch, weights.out, dtype, True).astype(dtype)
    _attention_backwards(at, qkv, attended, by_qkv)
    add(of_qkv, found.first.out.astype(dtype), by_qkv[...])
    by_normed = _rounded(_product(by_qkv[...], weights.qkv, dtype, True), dtype)
    by_first, by_vectors = found.first.backwards(by_normed)
    add_vectors(_NORM_1, by_vectors)
    by_x[...] = (slopes + _rounded(by_first, x.dtype)).astype(by_x.dtype)

    @pl.when(number == pl.num_programs(1) - 1)
    def _() -> None:
        for out, total in zip(by_matrices, sums, strict=True):
            if out is not None:
                out[...] = total[...].astype(out.dtype)


def _attention_backwards(at: _Utterance, qkv: Block, by_out: Block, by_qkv: Block) -> None:
    """by_out: the derivatives by what the heads give. by_qkv: written."""
    t, d = by_out.shape
    plan, sizes = at.heads(t, d)
    words, dtype = at.words(0), by_qkv.dtype
    for head in range(plan.heads):
        of_q, of_k, of_v = _parts(d, sizes.e, head)
        q, k, v = qkv[:, of_q], qkv[:, of_k], qkv[:, of_v]
        found = attention.weights_of(plan, sizes, head, 0, at.length, words, q, k)
        slopes = by_out[:, head * sizes.e : (head + 1) * sizes.e]
        used, by_scores = attention.by_softmax(sizes, found, attention.dot(slopes, v, (1, 1)))
        by_scores = by_scores.astype(dtype)
        by_qkv[:, of_q] = attention.dot(by_scores, k, (1, 0)).astype(dtype)
        by_qkv[:, of_k] = attention.dot(by_scores, q, (0, 0)).astype(dtype)
        by_qkv[:, of_v] = attention.dot(used.astype(dtype), slopes, (0, 0)).astype(dtype)
