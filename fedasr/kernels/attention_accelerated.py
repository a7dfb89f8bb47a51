"""`attention` for accelerators, in Pallas: no scores in memory, dropout of weights drawn within.

One launch each way. The weights' factors are what `fedasr.models.layers.dropout` draws of hashed
keys, so that results do not depend on who computes them. On a TPU a kernel has one utterance: all
keys, and so many queries at a time that their scores fit. On a GPU it has some queries of one head
and meets the keys in parts (FlashAttention, arXiv 2205.14135); its backward pass computes the
weights twice, once for the queries and once for the keys.

For programs whose devices are divided by hand, see `devices.platform`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedasr import generators
from fedasr.kernels import attention as attentions
from fedasr.kernels.one_batch import one_batch

KEPT = ("attention",)  # names of what the backward pass needs, for `jax.checkpoint`'s policies
_NEVER = -1e30  # as in `attention`
_AT_ONCE = 128  # queries of a TPU's turn
_TILE = 64  # queries and keys of a GPU's, at most
_LONGEST = 1024  # frames of a TPU's kernel: it has all keys of an utterance, and their scores
_VMEM = 64 << 20

Block = Any  # a reference to a block of an array


class Plan(NamedTuple):
    """kind: "tpu" or "gpu". heads; rate: of dropout; interpret: on the CPU, for tests."""

    kind: str
    heads: int
    rate: float
    interpret: bool = False


def fits(kind: str, frames: int, features: int, heads: int) -> bool:
    """Whether there is a kernel for so many frames of so many features, of all heads together."""
    size = features // heads
    if kind == "tpu":
        return frames <= _LONGEST and size % 4 == 0
    return bool(kind) and size >= 16 and len(_pieces(size)) <= 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(plan: Plan, qkv: jax.Array, lengths: jax.Array, words: jax.Array) -> jax.Array:
    """What `attention.attention` computes of queries, keys and values side by side.

    Args:
      plan: static.
      qkv: [b, t, 3 d], of each the heads one after another.
      lengths: int32 [b], true frames, which come first.
      words: uint32 [b, 2], of the utterances' hashed keys; with a rate of 0 anything.

    Returns:
      [b, t, d] in the dtype of qkv; the weights are computed in float32.
    """
    return _forward(plan, qkv, lengths, words)[0]


def reference(plan: Plan, qkv: jax.Array, lengths: jax.Array, words: jax.Array) -> jax.Array:
    """What the kernels compute, by way of all scores."""
    b, t, wide = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, plan.heads, -1), 2, 0)
    frames = jnp.arange(t, dtype=jnp.uint32)

    def of_utterance(words: jax.Array) -> Any:
        pair = (words[0], words[1])
        every = (_factors(plan, pair, h, frames[:, None], frames[None]) for h in range(plan.heads))
        return jnp.stack([factors for factors in every if factors is not None])

    factors = jax.vmap(of_utterance)(words) if plan.rate else None
    mask = jnp.arange(t) < lengths[:, None]
    return attentions.attention(q, k, v, mask, factors).reshape(b, t, wide // 3)


def _forward(plan: Plan, qkv: jax.Array, lengths: jax.Array, words: jax.Array) -> Any:
    args = (qkv, lengths.astype(jnp.int32), words)
    if plan.kind == "tpu":
        out = checkpoint_name(one_batch(functools.partial(_tpu_forwards, plan))(*args), KEPT[0])
        return out, (args, out, None)
    found = one_batch(functools.partial(_gpu_forwards, plan))(*args)
    out, sums = (checkpoint_name(x, KEPT[0]) for x in found)
    return out, (args, out, sums)


def _backward(plan: Plan, saved: Any, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    args, out, sums = saved
    gradient = gradient.astype(out.dtype)
    if plan.kind == "tpu":
        by_qkv = one_batch(functools.partial(_tpu_backwards, plan))(*args, gradient)
    else:
        by_qkv = one_batch(functools.partial(_gpu_backwards, plan))(*args, gradient, out, sums)
    return by_qkv, None, None


attention.defvjp(_forward, _backward)


def _extended(x: jax.Array, frames: int) -> jax.Array:
    """[b, t, ...] with zeros behind its frames; no operation where it is long enough."""
    if x.shape[1] == frames:
        return x
    return jnp.pad(x, ((0, 0), (0, frames - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def _factors(
    plan: Plan, words: tuple[Any, Any], head: Any, query: Any, key: Any
) -> jax.Array | None:
    """Of the weights of some queries and keys: 0, or 1 / (1 - rate); None for no dropout.

    Args:
      words: of the utterance's key. head: a number. query: uint32 [q, 1]. key: uint32 [1, k].
    """
    if not plan.rate:
        return None
    of_query = generators.folded_words(*words, query)
    index = key * jnp.uint32(plan.heads) + jnp.uint32(head)
    kept = generators.kept_words(*of_query, index, plan.rate)
    return jnp.where(kept, jnp.float32(1 / (1 - plan.rate)), jnp.float32(0))


def _iota(shape: tuple[int, int], axis: int, start: Any = 0) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) + start


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product of two matrices by these axes, float32."""
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, contracted, preferred_element_type=jnp.float32)


def _cost(b: int, t: int, d: int, heads: int, products: int, moved: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * products * b * t * t * d,
        bytes_accessed=moved,
        transcendentals=b * heads * t * t,
    )


# A TPU's.


class Sizes(NamedTuple):
    frames: int  # with those that fill up turns
    at_once: int  # queries
    d: int
    e: int


def _tpu_sizes(t: int, d: int, heads: int) -> Sizes:
    at_once = min(_AT_ONCE, -(-t // 16) * 16)
    return Sizes(-(-t // at_once) * at_once, at_once, d, d // heads)


def _tpu_call(
    plan: Plan, kernel: Any, name: str, wide: tuple[jax.Array, ...], lengths: Any, words: Any,
    features: int, scratch: Any, products: int,
) -> jax.Array:  # fmt: skip
    """A kernel for each utterance: of `wide` [b, t, ...] to [b, t, features]."""
    b, t = wide[0].shape[:2]
    sizes = _tpu_sizes(t, wide[0].shape[2] // 3, plan.heads)
    wide = tuple(_extended(x, sizes.frames) for x in wide)

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, sizes.frames, width), lambda i: (i, 0, 0))

    # Not prefetched, which would be what all utterances are told.
    told = pl.BlockSpec((None, 1, 3), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)
    given = jnp.concatenate(
        [lengths[:, None], jax.lax.bitcast_convert_type(words, jnp.int32)], axis=1
    )

    moved = sum(x.nbytes for x in wide) + b * sizes.frames * features * wide[0].dtype.itemsize
    out = pl.pallas_call(
        functools.partial(kernel, plan, sizes),
        grid=(b,),
        in_specs=[told, *(rows(x.shape[2]) for x in wide)],
        out_specs=rows(features),
        out_shape=jax.ShapeDtypeStruct((b, sizes.frames, features), wide[0].dtype),
        scratch_shapes=scratch(sizes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=_cost(b, sizes.frames, sizes.d, plan.heads, products, moved),
        interpret=plan.interpret,
        name=name,
    )(given[:, None], *wide)
    return out[:, :t]


def _tpu_forwards(plan: Plan, qkv: jax.Array, lengths: jax.Array, words: jax.Array) -> jax.Array:
    return _tpu_call(
        plan, _tpu_forwards_kernel, "attention_forwards", (qkv,), lengths, words,
        qkv.shape[2] // 3, lambda sizes: [], 2,
    )  # fmt: skip


def _tpu_backwards(
    plan: Plan, qkv: jax.Array, lengths: jax.Array, words: jax.Array, gradient: jax.Array
) -> jax.Array:
    def scratch(sizes: Sizes) -> list[Any]:
        return [pltpu.VMEM((sizes.frames, sizes.e), jnp.float32)] * 2

    return _tpu_call(
        plan, _tpu_backwards_kernel, "attention_backwards", (qkv, gradient), lengths, words,
        qkv.shape[2], scratch, 5,
    )  # fmt: skip


def weights_of(
    plan: Plan, sizes: Sizes, head: int, start: Any, length: Any, words: Any, q: Any, k: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Of some queries: weights of all keys [q, t], their factors, and which keys are true."""
    shape = (sizes.at_once, sizes.frames)
    true = _iota(shape, 1) < length
    scores = jnp.where(true, dot(q, k, (1, 1)) * sizes.e**-0.5, _NEVER)
    shares = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    weights = shares / jnp.sum(shares, axis=1, keepdims=True)
    query = _iota((sizes.at_once, 1), 0, start).astype(jnp.uint32)
    key = _iota((1, sizes.frames), 1).astype(jnp.uint32)
    return weights, _factors(plan, words, head, query, key), true


def by_softmax(sizes: Sizes, found: Any, by_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights as they were used, and the derivatives by the products of queries and keys.

    Args:
      found: of `weights_of`. by_weights: derivatives by the weights as they were used, [q, t].
    """
    weights, factors, true = found
    used = weights
    if factors is not None:
        used, by_weights = weights * factors, by_weights * factors
    mean = jnp.sum(weights * by_weights, axis=1, keepdims=True)
    return used, jnp.where(true, weights * (by_weights - mean), 0.0) * sizes.e**-0.5


def _told(given: Block) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """An utterance's true frames, and the words of its key."""
    return given[0, 0], (given[0, 1].astype(jnp.uint32), given[0, 2].astype(jnp.uint32))


def _tpu_forwards_kernel(plan: Plan, sizes: Sizes, given: Block, qkv: Block, out: Block) -> None:
    (length, key_words), e, d = _told(given), sizes.e, sizes.d
    for head in range(plan.heads):
        k = qkv[:, d + head * e : d + (head + 1) * e]
        v = qkv[:, 2 * d + head * e : 2 * d + (head + 1) * e]

        def turn(number: jax.Array, nothing: Any, head: int = head, k: Any = k, v: Any = v) -> Any:
            start = pl.multiple_of(number * sizes.at_once, sizes.at_once)
            rows = pl.ds(start, sizes.at_once)
            q = qkv[rows, head * e : (head + 1) * e]
            weights, factors, _ = weights_of(plan, sizes, head, start, length, key_words, q, k)
            used = weights if factors is None else weights * factors
            out[rows, head * e : (head + 1) * e] = dot(used.astype(v.dtype), v, (1, 0)).astype(
                out.dtype
            )
            return nothing

        jax.lax.fori_loop(0, sizes.frames // sizes.at_once, turn, 0)


def _tpu_backwards_kernel(
    plan: Plan, sizes: Sizes, given: Block,
    qkv: Block, gradient: Block, by_qkv: Block, by_k: Block, by_v: Block,
) -> None:  # fmt: skip
    (length, key_words), e, d = _told(given), sizes.e, sizes.d
    dtype = by_qkv.dtype
    for head in range(plan.heads):
        of_q, of_k, of_v = (slice(p * d + head * e, p * d + (head + 1) * e) for p in range(3))
        k, v = qkv[:, of_k], qkv[:, of_v]
        by_k[...] = jnp.zeros_like(by_k)
        by_v[...] = jnp.zeros_like(by_v)

        def turn(
            number: jax.Array, nothing: Any, head: int = head, of: slice = of_q,
            k: Any = k, v: Any = v,
        ) -> Any:  # fmt: skip
            start = pl.multiple_of(number * sizes.at_once, sizes.at_once)
            rows = pl.ds(start, sizes.at_once)
            q, slopes = qkv[rows, of], gradient[rows, of]
            found = weights_of(plan, sizes, head, start, length, key_words, q, k)
            used, by_scores = by_softmax(sizes, found, dot(slopes, v, (1, 1)))
            by_v[...] += dot(used.astype(dtype), slopes, (0, 0))
            by_scores = by_scores.astype(dtype)
            by_qkv[rows, of] = dot(by_scores, k, (1, 0)).astype(dtype)
            by_k[...] += dot(by_scores, q, (0, 0))
            return nothing

        jax.lax.fori_loop(0, sizes.frames // sizes.at_once, turn, 0)
        by_qkv[:, of_k] = by_k[...].astype(dtype)
        by_qkv[:, of_v] = by_v[...].astype(dtype)


# A GPU's.


def _pieces(size: int) -> list[tuple[int, int]]:
    """Beginnings and powers of two that a size is the sum of, at least 16; the last may be over."""
    found, begin = [], 0
    while begin < size:
        left = size - begin
        piece = 1 << (left.bit_length() - 1)
        piece = max(piece, 16)
        found.append((begin, piece))
        begin += piece
    return found


class _Head(NamedTuple):
    """Which parts of an utterance's arrays a GPU's kernel reads and writes."""

    tile: int
    d: int
    e: int
    number: Any

    def load(self, x: Block, part: int, start: Any) -> list[jax.Array]:
        """Of queries (part 0), keys (1) or values (2) of some frames, piece by piece: [tile, n]."""
        from jax.experimental.pallas import triton as plgpu  # a release of JAX may lack it

        found = []
        for rows, columns, inside in self._places(part, start):
            at = x.at[rows, columns]
            found.append(
                plgpu.load(at) if inside is None else plgpu.load(at, mask=inside, other=0.0)
            )
        return found

    def store(self, x: Block, part: int, start: Any, values: list[jax.Array]) -> None:
        """The same way back."""
        from jax.experimental.pallas import triton as plgpu

        for (rows, columns, inside), value in zip(self._places(part, start), values, strict=True):
            plgpu.store(x.at[rows, columns], value.astype(x.dtype), mask=inside)

    def _places(self, part: int, start: Any) -> list[tuple[Any, Any, Any]]:
        found = []
        for begin, size in _pieces(self.e):
            columns = pl.ds(part * self.d + self.number * self.e + begin, size)
            inside = None
            if begin + size > self.e:
                inside = _iota((self.tile, size), 1, begin) < self.e
            found.append((pl.ds(start, self.tile), columns, inside))
        return found


def _gpu_call(
    plan: Plan, kernel: Any, name: str, wide: tuple[jax.Array, ...], rows: tuple[jax.Array, ...],
    lengths: Any, words: Any, out_shape: Any, products: int,
) -> Any:  # fmt: skip
    """A kernel for some frames of each head: of `wide` [b, t, ...] and `rows` [b, heads, t]."""
    from jax.experimental.pallas import triton as plgpu

    b, t, d = wide[0].shape[0], wide[0].shape[1], wide[0].shape[2] // 3

    def of_utterance(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, *_: (i, *[0] * (len(x.shape) - 1)))

    args = (lengths[:, None], words, *wide, *rows)
    moved = sum(x.nbytes for x in (*wide, *rows))
    moved += sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(out_shape))
    return pl.pallas_call(
        functools.partial(kernel, plan, d),
        grid=(b, plan.heads, t // _tile(t)),
        in_specs=[of_utterance(x) for x in args],
        out_specs=jax.tree.map(of_utterance, out_shape),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if d // plan.heads > 64 else 4, num_stages=2
        ),
        cost_estimate=_cost(b, t, d, plan.heads, products, moved),
        interpret=plan.interpret,
        name=name,
    )(*args)


def _tile(t: int) -> int:
    """So many queries and keys that no frames have to be added, if there are such."""
    return next((size for size in (_TILE, _TILE // 2, _TILE // 4) if t % size == 0), _TILE)


def _whole_tiles(x: jax.Array) -> jax.Array:
    tile = _tile(x.shape[1])
    return _extended(x, -(-x.shape[1] // tile) * tile)


def _gpu_forwards(plan: Plan, qkv: jax.Array, lengths: jax.Array, words: jax.Array) -> Any:
    b, t, wide = qkv.shape
    qkv = _whole_tiles(qkv)
    shapes = (
        jax.ShapeDtypeStruct((b, qkv.shape[1], wide // 3), qkv.dtype),
        jax.ShapeDtypeStruct((b, plan.heads, qkv.shape[1]), jnp.float32),
    )
    out, sums = _gpu_call(
        plan, _gpu_forwards_kernel, "attention_forwards", (qkv,), (), lengths, words, shapes, 2
    )
    return out[:, :t], sums


def _gpu_backwards(
    plan: Plan, qkv: jax.Array, lengths: jax.Array, words: jax.Array,
    gradient: jax.Array, out: jax.Array, sums: jax.Array,
) -> jax.Array:  # fmt: skip
    t = qkv.shape[1]
    wide = tuple(map(_whole_tiles, (qkv, gradient, out)))
    shape = jax.ShapeDtypeStruct(wide[0].shape, qkv.dtype)
    by_qkv = _gpu_call(
        plan, _gpu_backwards_kernel, "attention_backwards", wide, (sums,), lengths, words, shape, 7
    )
    return by_qkv[:, :t]


def _sum_of_dots(x: list[jax.Array], y: list[jax.Array]) -> jax.Array:
    """x @ y.T of what is in pieces."""
    return functools.reduce(jnp.add, [dot(a, b, (1, 1)) for a, b in zip(x, y, strict=True)])


def _gpu_forwards_kernel(
    plan: Plan, d: int, lengths: Block, words: Block, qkv: Block, out: Block, sums: Block
) -> None:
    tile = _tile(qkv.shape[0])
    head, start = pl.program_id(1), pl.program_id(2) * tile
    at = _Head(tile, d, d // plan.heads, head)
    length, key_words = lengths[0], (words[0], words[1])
    q = at.load(qkv, 0, start)
    query = _iota((tile, 1), 0, start).astype(jnp.uint32)

    def turn(part: jax.Array, carry: Any) -> Any:
        most, total, sums = carry
        k, v = at.load(qkv, 1, part * tile), at.load(qkv, 2, part * tile)
        key = _iota((1, tile), 1, part * tile)
        scores = jnp.where(key < length, _sum_of_dots(q, k) * at.e**-0.5, _NEVER)
        new = jnp.maximum(most, jnp.max(scores, axis=1))
        before = jnp.exp(most - new)
        shares = jnp.exp(scores - new[:, None])
        factors = _factors(plan, key_words, head, query, key.astype(jnp.uint32))
        used = (shares if factors is None else shares * factors).astype(qkv.dtype)
        sums = [x * before[:, None] + dot(used, y, (1, 0)) for x, y in zip(sums, v, strict=True)]
        return new, total * before + jnp.sum(shares, axis=1), sums

    nothing = [jnp.zeros(x.shape, jnp.float32) for x in q]
    begin = jnp.full((tile,), _NEVER, jnp.float32), jnp.zeros((tile,), jnp.float32), nothing
    parts = jnp.maximum(pl.cdiv(length, tile), 1)
    most, total, summed = jax.lax.fori_loop(0, parts, turn, begin)
    at.store(out, 0, start, [x / total[:, None] for x in summed])
    sums[head, pl.ds(start, tile)] = most + jnp.log(total)


def _gpu_backwards_kernel(
    plan: Plan, d: int, lengths: Block, words: Block,
    qkv: Block, gradient: Block, out: Block, sums: Block, by_qkv: Block,
) -> None:  # fmt: skip
    """Of some frames, first as queries, then as keys."""
    tile = _tile(qkv.shape[0])
    head, start = pl.program_id(1), pl.program_id(2) * tile
    at = _Head(tile, d, d // plan.heads, head)
    length, key_words, scale = lengths[0], (words[0], words[1]), at.e**-0.5
    dtype = qkv.dtype

    def of_queries(begin: Any) -> tuple[Any, ...]:
        slopes = at.load(gradient, 0, begin)
        by_out = zip(slopes, at.load(out, 0, begin), strict=True)
        mean = sum(jnp.sum(x.astype(jnp.float32) * y, axis=1) for x, y in by_out)
        return at.load(qkv, 0, begin), slopes, mean, sums[head, pl.ds(begin, tile)]

    def slopes_of(
        scores: Any, by_weights: Any, mean: Any, total: Any, query: Any, key: Any
    ) -> tuple[jax.Array, jax.Array]:
        true = key < length
        weights = jnp.exp(jnp.where(true, scores * scale, _NEVER) - total)
        factors = _factors(plan, key_words, head, query.astype(jnp.uint32), key.astype(jnp.uint32))
        used = weights
        if factors is not None:
            used, by_weights = weights * factors, by_weights * factors
        by_scores = jnp.where(true, weights * (by_weights - mean), 0.0) * scale
        return used.astype(dtype), by_scores.astype(dtype)

    q, slopes, mean, total = of_queries(start)
    query = _iota((tile, 1), 0, start)

    def keys(part: jax.Array, by_q: Any) -> Any:
        k, v = at.load(qkv, 1, part * tile), at.load(qkv, 2, part * tile)
        key = _iota((1, tile), 1, part * tile)
        scores, by_weights = _sum_of_dots(q, k), _sum_of_dots(slopes, v)
        _, by_scores = slopes_of(scores, by_weights, mean[:, None], total[:, None], query, key)
        return [x + dot(by_scores, y, (1, 0)) for x, y in zip(by_q, k, strict=True)]

    nothing = [jnp.zeros(x.shape, jnp.float32) for x in q]
    parts = jnp.maximum(pl.cdiv(length, tile), 1)
    at.store(by_qkv, 0, start, jax.lax.fori_loop(0, parts, keys, nothing))

    k, v = at.load(qkv, 1, start), at.load(qkv, 2, start)
    key = _iota((tile, 1), 0, start)

    def queries(part: jax.Array, carry: Any) -> Any:
        by_k, by_v = carry
        q, slopes, mean, total = of_queries(part * tile)
        query = _iota((1, tile), 1, part * tile)
        scores, by_weights = _sum_of_dots(k, q), _sum_of_dots(v, slopes)
        used, by_scores = slopes_of(scores, by_weights, mean[None], total[None], query, key)
        by_k = [x + dot(by_scores, y, (1, 0)) for x, y in zip(by_k, q, strict=True)]
        by_v = [x + dot(used, y, (1, 0)) for x, y in zip(by_v, slopes, strict=True)]
        return by_k, by_v

    by_k, by_v = jax.lax.fori_loop(0, pl.num_programs(2), queries, (nothing, nothing))
    at.store(by_qkv, 1, start, by_k)
    at.store(by_qkv, 2, start, by_v)
