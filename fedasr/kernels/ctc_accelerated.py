"""The walks of `ctc` for accelerators, in Pallas: the likelihood and all posteriors of a batch.

The loop that XLA is given launches several operations for each frame; here the frames are a loop
within a kernel. For a GPU one kernel walks forwards and then backwards, an utterance a block, and
states meet their neighbours through memory. A TPU has two kernels, eight utterances a block of
rows, some frames at a time, so that recordings of any length fit; states meet by rotations.

A kernel cannot be divided by the compiler: these are for programs whose devices are divided by
hand, see `devices.platform`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fedasr.kernels.one_batch import one_batch

NEVER = -1e30  # as in `ctc`
ROWS, LANES = 8, 128  # of a TPU's registers
_BLOCK = 1 << 17  # scores of a TPU's block of frames: half a MiB

Walks = Callable[..., tuple[jax.Array, jax.Array]]
Block = Any  # a reference to a block of an array


def _following(here: jax.Array, one: jax.Array, two: jax.Array) -> jax.Array:
    """The score after a frame: of staying, going on by one state, and by two."""
    most = jnp.maximum(jnp.maximum(here, one), two)
    return most + jnp.log(jnp.exp(here - most) + jnp.exp(one - most) + jnp.exp(two - most))


def _softmax(x: jax.Array) -> jax.Array:
    shares = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return shares / jnp.sum(shares, axis=-1, keepdims=True)


def posteriors(
    kind: str,
    emissions: jax.Array,
    first: jax.Array,
    last: jax.Array,
    jumps: jax.Array,
    frames: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Sums over paths and what share of them is in each state, as `ctc`'s walks give them.

    Args:
      kind: "tpu" or "gpu".
      emissions: float32 [b, t, s], relative to each frame's largest.
      first, last: float32 [b, s], score of beginning and of ending in a state.
      jumps: bool [b, s], whether the state before the last may be left out.
      frames: int32 [b], how many are true.
      interpret: on the CPU, for tests.

    Returns:
      The scores after the last true frame, [b, s], and posteriors [b, t, s], zero in other frames.
    """
    walks = {"tpu": _on_tpu, "gpu": _on_gpu}[kind]

    together = one_batch(functools.partial(walks, interpret=interpret))
    onwards = jnp.where(jumps, 0.0, NEVER)
    return together(emissions, first, last, onwards, frames.astype(jnp.int32))


def filled(states: int) -> int:
    """So many states as fill up a TPU's registers."""
    return -(-states // LANES) * LANES


def padded(x: jax.Array, axis: int, size: int, value: float) -> jax.Array:
    """x with `size` items along an axis, `value` behind its own."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _backwards(onwards: jax.Array) -> jax.Array:
    """Of each state, the penalty of the jump that leaves it."""
    return jnp.pad(onwards[:, 2:], ((0, 0), (0, 2)), constant_values=NEVER)


# A GPU's.


def _on_gpu(
    emissions: jax.Array,
    first: jax.Array,
    last: jax.Array,
    onwards: jax.Array,
    frames: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `posteriors`."""
    from jax.experimental.pallas import triton as plgpu  # a release of JAX may lack it

    b, t, s = emissions.shape
    size = pl.next_power_of_2(max(s, 16))
    rows = [padded(x, 1, size, NEVER) for x in (first, last, onwards, _backwards(onwards))]
    together = jnp.stack(rows, axis=1)  # padded by one launch

    def row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda i: (i, *[0] * len(shape)))

    after, posterior, _ = pl.pallas_call(
        functools.partial(_gpu_kernel, None if interpret else plgpu.debug_barrier),
        grid=(b,),
        in_specs=[row(t, size), row(len(rows), size), row(1)],
        out_specs=[row(size), row(t, size), row(2, size + 4)],
        out_shape=[
            jax.ShapeDtypeStruct((b, size), jnp.float32),
            jax.ShapeDtypeStruct((b, t, size), jnp.float32),
            jax.ShapeDtypeStruct((b, 2, size + 4), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=min(max(size // 128, 1), 8), num_stages=1),
        interpret=interpret,
        name="ctc_walks",
    )(padded(emissions, 2, size, NEVER), together, frames[:, None])
    return after[:, :s], posterior[..., :s]


def _gpu_kernel(
    barrier: Callable[[], None] | None,
    emissions: Block, rows: Block, frames: Block, after: Block, posterior: Block, beside: Block,
) -> None:  # fmt: skip
    """Of one utterance. rows: first, last, onwards and backwards [4, s].

    beside: [2, s + 4], where states read their neighbours' scores.
    """
    size = after.shape[0]
    first, last, onwards, backwards = range(4)
    nowhere = jnp.full((2,), NEVER, jnp.float32)
    for half in range(2):
        beside[half, pl.ds(0, 2)] = nowhere
        beside[half, pl.ds(size + 2, 2)] = nowhere

    def meet() -> None:
        if barrier is not None:
            barrier()

    def advance(turn: jax.Array, score: jax.Array, sign: int, penalty: jax.Array) -> jax.Array:
        # By turns in two halves: what is read is overwritten behind the next barrier only.
        half = jnp.bitwise_and(turn, 1)
        beside[half, pl.ds(2, size)] = score
        meet()
        one = beside[half, pl.ds(2 - sign, size)]
        two = beside[half, pl.ds(2 - 2 * sign, size)]
        return _following(score, one, two + penalty)

    true, whole = frames[0], posterior.shape[0]
    penalty = rows[onwards, :]

    def forwards(frame: jax.Array, score: jax.Array) -> jax.Array:
        posterior[frame, :] = score
        return advance(frame, score + emissions[frame, :], 1, penalty)

    after[:] = jax.lax.fori_loop(0, true, forwards, rows[first, :])
    meet()
    leaving = rows[backwards, :]

    def backwards_too(turn: jax.Array, score: jax.Array) -> jax.Array:
        frame = true - 1 - turn
        score = score + emissions[frame, :]
        posterior[frame, :] = _softmax(posterior[frame, :] + score)
        return advance(turn, score, -1, leaving)

    jax.lax.fori_loop(0, true, backwards_too, rows[last, :])

    def clear(frame: jax.Array, nothing: jax.Array) -> jax.Array:
        posterior[frame, :] = jnp.zeros((size,), jnp.float32)
        return nothing

    jax.lax.fori_loop(true, whole, clear, jnp.int32(0))


# A TPU's.


def _on_tpu(
    emissions: jax.Array,
    first: jax.Array,
    last: jax.Array,
    onwards: jax.Array,
    frames: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `posteriors`."""
    b, t, s = emissions.shape
    size, rows = filled(s), -(-b // ROWS) * ROWS
    at_once = max(1, min(_BLOCK // (ROWS * size), t))
    parts = -(-t // at_once)
    length = parts * at_once

    def tiled(x: jax.Array, value: float) -> jax.Array:
        return padded(padded(x, 0, rows, value), 1, size, value)

    by_frame = jnp.moveaxis(padded(padded(emissions, 0, rows, 0.0), 2, size, NEVER), 1, 0)
    by_frame = padded(by_frame, 0, length, 0.0)
    true = jnp.broadcast_to(padded(frames, 0, rows, 0)[:, None], (rows, size))
    of_row = pl.BlockSpec((ROWS, size), lambda i, j: (i, 0))
    onto = pl.BlockSpec((at_once, ROWS, size), lambda i, j: (j, i, 0))
    back = pl.BlockSpec((at_once, ROWS, size), lambda i, j: (parts - 1 - j, i, 0))
    row_shape = jax.ShapeDtypeStruct((rows, size), jnp.float32)
    shape = jax.ShapeDtypeStruct((length, rows, size), jnp.float32)
    common: dict[str, Any] = {
        "grid": (rows // ROWS, parts),
        "scratch_shapes": [pltpu.VMEM((ROWS, size), jnp.float32)],
        "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        "interpret": interpret,
    }
    before, after = pl.pallas_call(
        _tpu_forwards,
        in_specs=[onto, of_row, of_row, of_row],
        out_specs=[onto, of_row],
        out_shape=[shape, row_shape],
        name="ctc_forwards",
        **common,
    )(by_frame, tiled(first, NEVER), tiled(onwards, NEVER), true)
    posterior = pl.pallas_call(
        _tpu_backwards,
        in_specs=[back, back, of_row, of_row, of_row],
        out_specs=back,
        out_shape=shape,
        name="ctc_backwards",
        **common,
    )(by_frame, before, tiled(last, NEVER), tiled(_backwards(onwards), NEVER), true)
    return after[:b, :s], jnp.moveaxis(posterior, 0, 1)[:b, :t, :s]


def shifted(score: jax.Array, by: int) -> jax.Array:
    """Each state's neighbour so many states before it; beyond the ends there is none."""
    size = score.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    inside = lane >= by if by > 0 else lane < size + by
    return jnp.where(inside, pltpu.roll(score, by % size, 1), NEVER)


def _tpu_forwards(
    emissions: Block, first: Block, onwards: Block, frames: Block,
    before: Block, after: Block, carry: Block,
) -> None:  # fmt: skip
    """Some frames of eight utterances; the grid's second axis goes on in time."""
    part, at_once = pl.program_id(1), emissions.shape[0]

    @pl.when(part == 0)
    def _() -> None:
        carry[...] = first[...]

    def step(i: jax.Array, score: jax.Array) -> jax.Array:
        before[i] = score
        x = score + emissions[i]
        new = _following(x, shifted(x, 1), shifted(x, 2) + onwards[...])
        return jnp.where(part * at_once + i < frames[...], new, score)

    carry[...] = jax.lax.fori_loop(0, at_once, step, carry[...])
    after[...] = carry[...]


def _tpu_backwards(
    emissions: Block, before: Block, last: Block, leaving: Block, frames: Block,
    posterior: Block, carry: Block,
) -> None:  # fmt: skip
    """The same, back in time."""
    part, at_once = pl.num_programs(1) - 1 - pl.program_id(1), emissions.shape[0]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        carry[...] = last[...]

    def step(turn: jax.Array, score: jax.Array) -> jax.Array:
        i = at_once - 1 - turn
        real = part * at_once + i < frames[...]
        x = score + emissions[i]
        posterior[i] = jnp.where(real, _softmax(before[i] + x), 0.0)
        new = _following(x, shifted(x, -1), shifted(x, -2) + leaving[...])
        return jnp.where(real, new, score)

    carry[...] = jax.lax.fori_loop(0, at_once, step, carry[...])
