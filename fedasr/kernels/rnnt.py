"""The recurrent neural network transducer (RNN-T): the loss and greedy decoding.

Graves, "Sequence transduction with recurrent neural networks", 2012, arXiv 1211.3711. An alignment
is a path through a lattice of frames and label positions: a label moves one position on, a blank,
class 0, one frame on, and the blank that leaves the last frame after the last label ends it.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedasr.kernels import devices
from fedasr.kernels.ctc import BLANK, compact

_NEVER = -1e30  # a log-probability; unlike -inf it has differences and gradients


def rnnt_loss(
    logits: jax.Array, logit_lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the labels, per utterance (equations 16 to 18 of the paper).

    Invariant to padding of every axis, whatever the padding holds. An utterance without frames
    cannot be aligned: it has loss exactly 0 and gradients exactly 0.

    Args:
      logits: float [b, t, u + 1, v], unnormalised scores of what comes next in a frame after so
        many labels; computed in float32.
      logit_lengths: int [b], true frames.
      labels: int [b, u], each in 1..v-1 within its length.
      label_lengths: int [b], true labels.

    Returns:
      loss float32 [b] in nats, and feasible bool [b].
    """
    feasible = logit_lengths > 0
    last_frame = jnp.maximum(logit_lengths, 1)[:, None, None] - 1
    last_label = jnp.where(feasible, label_lengths, 0)[:, None, None]
    frame = jnp.arange(logits.shape[1])[:, None]
    position = jnp.arange(logits.shape[2])
    valid = (frame <= last_frame) & (position <= last_label) & feasible[:, None, None]
    # Zero what must not count before the loss, not after it: no NaN can then reach a gradient.
    logits = jnp.where(valid[..., None], logits.astype(jnp.float32), 0)
    total = jax.nn.logsumexp(logits, axis=-1)
    blank = logits[..., BLANK] - total
    # A sum over a comparison: the gradient of a gather would be a scatter.
    following = jnp.pad(labels, ((0, 0), (0, 1)))[:, None, :, None] == jnp.arange(logits.shape[3])
    label = jnp.sum(jnp.where(following, logits, 0), axis=-1) - total

    end = (frame == last_frame) & (position == last_label)
    ending = jnp.sum(jnp.where(end, blank, 0), axis=(1, 2))
    blank = jnp.where(valid & (frame < last_frame), blank, _NEVER)
    label = jnp.where(valid & (position < last_label), label, _NEVER)
    moves = (last_frame + last_label)[:, 0, 0]
    ends = position == last_label[:, 0]
    walked = _by_kernel if devices.platform() else _by_loop
    total = walked(_diagonals(blank), _diagonals(label), ends, moves) + ending
    return jnp.where(feasible, -total, 0), feasible


def _by_loop(blank: jax.Array, label: jax.Array, ends: jax.Array, moves: jax.Array) -> jax.Array:
    """Log of the summed probability of all paths, [b]: the forward variables, by diagonals.

    Args:
      blank, label: float32 [n, b, p], log-probabilities of moves.
      ends: bool [b, p], where paths end. moves: int [b], how many a path makes.
    """

    def step(state, diagonal):
        # alpha: log-probability of reaching each position of a diagonal, less `scale`, so that
        # float32 keeps the differences between positions however improbable all of them are.
        alpha, scale = state
        i, blank, label = diagonal
        on = jnp.pad((alpha + label)[:, :-1], ((0, 0), (1, 0)), constant_values=_NEVER)
        reached = jnp.logaddexp(alpha + blank, on)
        top = jax.lax.stop_gradient(reached.max(axis=1, keepdims=True))
        going = i < moves[:, None]
        return (jnp.where(going, reached - top, alpha), scale + jnp.where(going, top, 0)), None

    alpha = jnp.where(jnp.arange(blank.shape[2]) == 0, 0.0, jnp.full(blank.shape[1:], _NEVER))
    start = alpha, jnp.zeros_like(alpha[:, :1])
    (alpha, scale), _ = jax.lax.scan(step, start, (jnp.arange(len(blank)), blank, label))
    return jnp.sum(jnp.where(ends, alpha, 0), axis=1) + scale[:, 0]


@jax.custom_vjp
def _by_kernel(blank: jax.Array, label: jax.Array, ends: jax.Array, moves: jax.Array) -> jax.Array:
    """`_by_loop` by a device's own kernel, with its first derivative: see `rnnt_accelerated`."""
    return _by_kernel_forward(blank, label, ends, moves)[0]


def _by_kernel_forward(blank, label, ends, moves):
    from fedasr.kernels import rnnt_accelerated  # Pallas takes a second to import

    ending = jnp.where(ends, 0.0, _NEVER)
    by_utterance = jnp.moveaxis(blank, 0, 1), jnp.moveaxis(label, 0, 1)
    total, *shares = rnnt_accelerated.posteriors(devices.platform(), *by_utterance, ending, moves)
    return total, tuple(shares)


def _by_kernel_backward(shares, gradient):
    return *(jnp.moveaxis(x, 1, 0) * gradient[:, None] for x in shares), None, None


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def reference(
    logits: jax.Array, logit_lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array
) -> jax.Array:
    """The loss of `rnnt_loss`, [b] in the logits' dtype: the forward variables of equation 16.

    One utterance and one point of the lattice after the other.
    """

    def one(log_probs: jax.Array, frames: int, labels: jax.Array, count: int) -> jax.Array:
        alpha: dict[tuple[int, int], jax.Array] = {}
        for t, u in itertools.product(range(frames), range(count + 1)):
            ways = []
            if t:
                ways.append(alpha[t - 1, u] + log_probs[t - 1, u, BLANK])
            if u:
                ways.append(alpha[t, u - 1] + log_probs[t, u - 1, labels[u - 1]])
            alpha[t, u] = functools.reduce(jnp.logaddexp, ways or [jnp.zeros((), log_probs.dtype)])
        return -alpha[frames - 1, count] - log_probs[frames - 1, count, BLANK]

    log_probs = jax.nn.log_softmax(logits)
    sizes = zip(map(int, logit_lengths), map(int, label_lengths), strict=True)
    return jnp.stack(
        [
            one(log_probs[i], frames, labels[i], count) if frames else jnp.zeros((), logits.dtype)
            for i, (frames, count) in enumerate(sizes)
        ]
    )


def _diagonals(x: jax.Array) -> jax.Array:
    """[b, t, u] -> [t + u - 1, b, u]: item i holds frames i - u, `_NEVER` where there is none."""
    b, t, u = x.shape
    count = t + u - 1
    # Rows of one item more than they are read with: each begins one place after the one before.
    rows = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, u)), constant_values=_NEVER)
    return jnp.moveaxis(rows.reshape(b, -1)[:, : u * count].reshape(b, u, count), 2, 0)


def greedy_decode(
    score: Callable[[jax.Array, jax.Array], jax.Array],
    encoded: jax.Array,
    lengths: jax.Array,
    context: int,
    max_symbols: int,
) -> tuple[jax.Array, jax.Array]:
    """The best next symbol, again and again: a blank moves one frame on, a label is written.

    A frame that has written `max_symbols` labels is left as if a blank had come: without a bound a
    model might never leave it.

    Args:
      score: (frame [b, d], last labels int32 [b, context]) -> scores [b, v]. The last of the labels
        is the latest; blanks stand for labels before the first.
      encoded: [b, t, d], such as an encoder's output.
      lengths: int [b], true frames.
      context: how many labels `score` looks back on.
      max_symbols: labels that one frame may write.

    Returns:
      tokens int32 [b, t * max_symbols], padded with 0, and their number int32 [b].
    """
    b, frames, _ = encoded.shape

    def write(state, _, frame):
        last, going = state
        best = jnp.argmax(score(frame, last), axis=-1).astype(jnp.int32)
        going = going & (best != BLANK)
        longer = jnp.concatenate([last, best[:, None]], axis=1)[:, 1:]
        return (jnp.where(going[:, None], longer, last), going), jnp.where(going, best, BLANK)

    def visit(last, item):
        i, frame = item
        (last, _), tokens = jax.lax.scan(
            lambda *args: write(*args, frame), (last, i < lengths), length=max_symbols
        )
        return last, tokens

    start = jnp.full((b, context), BLANK, jnp.int32)
    _, tokens = jax.lax.scan(visit, start, (jnp.arange(frames), encoded.swapaxes(0, 1)))
    tokens = jnp.moveaxis(tokens, 2, 0).reshape(b, frames * max_symbols)
    return compact(tokens, tokens != BLANK)
