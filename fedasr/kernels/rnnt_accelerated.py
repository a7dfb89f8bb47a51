"""The walks of `rnnt` for accelerators, in Pallas: the likelihood and what paths do, of a batch.

As in `ctc_accelerated`: diagonals of the lattice are a loop within a kernel. A GPU's walks forwards
and then backwards, an utterance a block, a TPU has two, eight utterances a block of rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedasr.kernels.ctc_accelerated import LANES, NEVER, ROWS, padded, shifted
from fedasr.kernels.one_batch import one_batch

_BLOCK = 1 << 16  # scores of a TPU's block of diagonals: a quarter of a MiB, and five such arrays

Walks = tuple[jax.Array, jax.Array, jax.Array]
Block = Any  # a reference to a block of an array


def posteriors(
    kind: str,
    blank: jax.Array,
    label: jax.Array,
    ending: jax.Array,
    moves: jax.Array,
    interpret: bool = False,
) -> Walks:
    """The log of the summed probability of all paths, and the share of them that makes each move.

    Paths begin at position 0 of the first diagonal and make one move from each diagonal to the
    next: a blank stays at the position, a label goes on by one.

    Args:
      kind: "tpu" or "gpu".
      blank, label: float32 [b, n, p], log-probabilities of moves, by diagonal and position.
      ending: float32 [b, p], 0 where paths end, -1e30 elsewhere.
      moves: int32 [b], how many a path makes.
      interpret: on the CPU, for tests.

    Returns:
      Log-likelihoods [b], and shares of blanks and of labels [b, n, p], zero behind the moves. They
      are the likelihood's derivatives by `blank` and `label`.
    """
    walks = {"tpu": _on_tpu, "gpu": _on_gpu}[kind]
    together = one_batch(functools.partial(walks, interpret=interpret))
    # A probability of 0 may be -inf, of which there are no differences.
    blank, label = jnp.maximum(blank, NEVER), jnp.maximum(label, NEVER)
    found: Walks = together(blank, label, ending, moves.astype(jnp.int32))
    return found


def _either(a: jax.Array, b: jax.Array) -> jax.Array:
    most = jnp.maximum(a, b)
    return most + jnp.log(jnp.exp(a - most) + jnp.exp(b - most))


def _shares(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A softmax over the last axes of both."""
    most = jnp.max(jnp.maximum(a, b), axis=-1, keepdims=True)
    a, b = jnp.exp(a - most), jnp.exp(b - most)
    total = jnp.sum(a + b, axis=-1, keepdims=True)
    return a / total, b / total


def _first(size: int) -> jax.Array:
    return jnp.where(jnp.arange(size) == 0, 0.0, NEVER)


# A GPU's.


def _on_gpu(
    blank: jax.Array, label: jax.Array, ending: jax.Array, moves: jax.Array, *, interpret: bool
) -> Walks:
    """See `posteriors`."""
    from jax.experimental.pallas import triton as plgpu  # a release of JAX may lack it

    b, n, p = blank.shape
    size = pl.next_power_of_2(max(p, 16))
    ends = padded(ending, 1, size, NEVER)
    rows = jnp.stack([jnp.broadcast_to(_first(size), ends.shape), ends], axis=1)

    def row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda i: (i, *[0] * len(shape)))

    shape = jax.ShapeDtypeStruct((b, n, size), jnp.float32)
    after, of_blank, of_label, _ = pl.pallas_call(
        functools.partial(_gpu_kernel, None if interpret else plgpu.debug_barrier),
        grid=(b,),
        in_specs=[row(n, size), row(n, size), row(2, size), row(1)],
        out_specs=[row(size), row(n, size), row(n, size), row(2, size + 2)],
        out_shape=[
            jax.ShapeDtypeStruct((b, size), jnp.float32),
            shape,
            shape,
            jax.ShapeDtypeStruct((b, 2, size + 2), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=min(max(size // 128, 1), 8), num_stages=1),
        interpret=interpret,
        name="rnnt_walks",
    )(padded(blank, 2, size, NEVER), padded(label, 2, size, NEVER), rows, moves[:, None])
    return jnp.max(after, axis=1), of_blank[..., :p], of_label[..., :p]


def _gpu_kernel(
    barrier: Callable[[], None] | None,
    blank: Block, label: Block, rows: Block, moves: Block,
    after: Block, of_blank: Block, of_label: Block, beside: Block,
) -> None:  # fmt: skip
    """Of one utterance. rows: where paths begin and end [2, p].

    beside: [2, p + 2], where positions read their neighbours' scores.
    """
    size = after.shape[0]
    nowhere = jnp.full((1,), NEVER, jnp.float32)
    for half in range(2):
        beside[half, pl.ds(0, 1)] = nowhere
        beside[half, pl.ds(size + 1, 1)] = nowhere

    def meet() -> None:
        if barrier is not None:
            barrier()

    def neighbour(turn: jax.Array, score: jax.Array, by: int) -> jax.Array:
        # By turns in two halves: what is read is overwritten behind the next barrier only.
        half = jnp.bitwise_and(turn, 1)
        beside[half, pl.ds(1, size)] = score
        meet()
        found: jax.Array = beside[half, pl.ds(1 + by, size)]
        return found

    true, whole = moves[0], of_blank.shape[0]

    def forwards(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        score, scale = carry
        staying, going = score + blank[i, :], score + label[i, :]
        of_blank[i, :], of_label[i, :] = staying, going
        reached = _either(staying, neighbour(i, going, -1))
        # Relative to the largest, float32 keeps differences however improbable all are.
        top = jnp.max(reached)
        return reached - top, scale + top

    score, scale = jax.lax.fori_loop(0, true, forwards, (rows[0, :], jnp.float32(0)))
    after[:] = score + rows[1, :] + scale
    meet()

    def backwards(turn: jax.Array, score: jax.Array) -> jax.Array:
        i = true - 1 - turn
        on = neighbour(turn, score, 1)
        of_blank[i, :], of_label[i, :] = _shares(of_blank[i, :] + score, of_label[i, :] + on)
        left = _either(blank[i, :] + score, label[i, :] + on)
        return left - jnp.max(left)

    jax.lax.fori_loop(0, true, backwards, rows[1, :])

    def clear(i: jax.Array, nothing: jax.Array) -> jax.Array:
        of_blank[i, :] = jnp.zeros((size,), jnp.float32)
        of_label[i, :] = jnp.zeros((size,), jnp.float32)
        return nothing

    jax.lax.fori_loop(true, whole, clear, jnp.int32(0))


# A TPU's.


def _on_tpu(
    blank: jax.Array, label: jax.Array, ending: jax.Array, moves: jax.Array, *, interpret: bool
) -> Walks:
    """See `posteriors`."""
    b, n, p = blank.shape
    size, rows = -(-p // LANES) * LANES, -(-b // ROWS) * ROWS
    at_once = max(1, min(_BLOCK // (ROWS * size), n))
    parts = -(-n // at_once)
    length = parts * at_once

    def by_diagonal(x: jax.Array) -> jax.Array:
        x = padded(padded(x, 0, rows, NEVER), 2, size, NEVER)
        return padded(jnp.moveaxis(x, 1, 0), 0, length, NEVER)

    blank, label = by_diagonal(blank), by_diagonal(label)
    ends = padded(padded(ending, 0, rows, NEVER), 1, size, NEVER)
    first = jnp.broadcast_to(_first(size), ends.shape)
    true = jnp.broadcast_to(padded(moves, 0, rows, 0)[:, None], (rows, size))
    of_row = pl.BlockSpec((ROWS, size), lambda i, j: (i, 0))
    onto = pl.BlockSpec((at_once, ROWS, size), lambda i, j: (j, i, 0))
    back = pl.BlockSpec((at_once, ROWS, size), lambda i, j: (parts - 1 - j, i, 0))
    shape = jax.ShapeDtypeStruct((length, rows, size), jnp.float32)
    row = pltpu.VMEM((ROWS, size), jnp.float32)
    common: dict[str, Any] = {
        "grid": (rows // ROWS, parts),
        "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        "interpret": interpret,
    }
    before, after = pl.pallas_call(
        _tpu_forwards,
        in_specs=[onto, onto, of_row, of_row, of_row],
        out_specs=[onto, of_row],
        out_shape=[shape, jax.ShapeDtypeStruct((rows, size), jnp.float32)],
        scratch_shapes=[row, row],
        name="rnnt_forwards",
        **common,
    )(blank, label, first, ends, true)
    shares = pl.pallas_call(
        _tpu_backwards,
        in_specs=[back, back, back, of_row, of_row],
        out_specs=[back, back],
        out_shape=[shape, shape],
        scratch_shapes=[row],
        name="rnnt_backwards",
        **common,
    )(blank, label, before, ends, true)
    of_blank, of_label = (jnp.moveaxis(x, 0, 1)[:b, :n, :p] for x in shares)
    return jnp.max(after, axis=1)[:b], of_blank, of_label


def _tpu_forwards(
    blank: Block, label: Block, first: Block, ends: Block, moves: Block,
    before: Block, after: Block, score: Block, scale: Block,
) -> None:  # fmt: skip
    """Some diagonals of eight utterances; the grid's second axis goes on."""
    part, at_once = pl.program_id(1), blank.shape[0]

    @pl.when(part == 0)
    def _() -> None:
        score[...] = first[...]
        scale[...] = jnp.zeros_like(scale)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        score, scale = carry
        before[i] = score
        reached = _either(score + blank[i], shifted(score + label[i], 1))
        top = jnp.max(reached, axis=1, keepdims=True)
        going = part * at_once + i < moves[...]
        return jnp.where(going, reached - top, score), jnp.where(going, scale + top, scale)

    score[...], scale[...] = jax.lax.fori_loop(0, at_once, step, (score[...], scale[...]))
    after[...] = score[...] + ends[...] + scale[...]


def _tpu_backwards(
    blank: Block, label: Block, before: Block, ends: Block, moves: Block,
    of_blank: Block, of_label: Block, carry: Block,
) -> None:  # fmt: skip
    """The same, back."""
    part, at_once = pl.num_programs(1) - 1 - pl.program_id(1), blank.shape[0]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        carry[...] = ends[...]

    def step(turn: jax.Array, score: jax.Array) -> jax.Array:
        i = at_once - 1 - turn
        real = part * at_once + i < moves[...]
        on = shifted(score, -1)
        staying, going = score + blank[i], on + label[i]
        shares = _shares(before[i] + staying, before[i] + going)
        of_blank[i], of_label[i] = (jnp.where(real, x, 0.0) for x in shares)
        left = _either(staying, going)
        return jnp.where(real, left - jnp.max(left, axis=1, keepdims=True), score)

    carry[...] = jax.lax.fori_loop(0, at_once, step, carry[...])
