"""Connectionist temporal classification: the loss, what it can align, and greedy decoding.

Graves et al., "Connectionist temporal classification", ICML 2006. The blank is class 0.
"""

import jax
import jax.numpy as jnp

from fedasr.kernels import devices

BLANK = 0
_NEVER = -1e30  # log of the probability of what can't be; finite, lest differences of it be NaN


def is_feasible(labels: jax.Array, label_lengths: jax.Array, logit_lengths: jax.Array) -> jax.Array:
    """Whether any alignment exists: a frame per label and one per blank between equal neighbours.

    Args:
      labels: int [b, u], padded beyond `label_lengths` with anything.
      label_lengths: int [b]; an empty label fits into any number of frames.
      logit_lengths: int [b].

    Returns:
      bool [b].
    """
    inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
    return label_lengths + repeats <= logit_lengths


def ctc_loss(
    logits: jax.Array,
    logit_lengths: jax.Array,
    labels: jax.Array,
    label_lengths: jax.Array,
    stream: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the labels, per utterance.

    Invariant to padding of every axis, whatever the padding holds. An utterance whose labels cannot
    be aligned with its frames (`is_feasible`) has loss exactly 0 and gradients exactly 0.

    Args:
      logits: float [b, t, v], unnormalised; computed in float32.
      logit_lengths: int [b], true frames.
      labels: int [b, u], each in 1..v-1 within its length.
      label_lengths: int [b], true labels.
      stream: never have the scores of all states in all frames, [b, t, 2u + 1], in memory. For
        values alone: a gradient would need them.

    Returns:
      loss float32 [b] in nats, and feasible bool [b].
    """
    feasible = is_feasible(labels, label_lengths, logit_lengths)
    frame = jnp.arange(logits.shape[1]) < logit_lengths[:, None]
    # Zero what must not count before the loss, not after it: no NaN can then reach a gradient.
    valid = frame & feasible[:, None]
    logits = jnp.where(valid[:, :, None], logits.astype(jnp.float32), 0)
    log_probs = jax.nn.log_softmax(logits)
    if stream:
        loss = -_streamed_log_likelihood(log_probs, logit_lengths, labels, label_lengths, feasible)
        return jnp.where(feasible, loss, 0), feasible
    emissions = _emissions(log_probs, labels)
    jumps = _jumps(labels, emissions.shape[2])
    states = 2 * jnp.where(feasible, label_lengths, 0) + 1
    frames = jnp.where(feasible, logit_lengths, 0)
    loss = -_log_likelihood(emissions, jumps, frames, states)
    return jnp.where(feasible, loss, 0), feasible


def reference(
    logits: jax.Array, logit_lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array
) -> jax.Array:
    """The loss of `ctc_loss`, [b] in the logits' dtype: the forward variables of equation 6.

    One utterance and one frame after the other, with the derivative that JAX finds.
    """

    def one(logits: jax.Array, frames: int, labels: jax.Array, count: int) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits[:frames])
        # blank, label, blank, ..., label, blank
        tokens = jnp.full(2 * count + 1, BLANK).at[1::2].set(labels[:count])
        emissions = log_probs[:, tokens]
        jump = (tokens[2:] != BLANK) & (tokens[2:] != tokens[:-2])
        score = jnp.where(jnp.arange(len(tokens)) < 2, 0.0, _NEVER).astype(logits.dtype)
        for t in range(frames):
            if t:
                one = jnp.pad(score[:-1], (1, 0), constant_values=_NEVER)
                two = jnp.where(jump, score[:-2], _NEVER)
                two = jnp.pad(two, (2, 0), constant_values=_NEVER)[: len(tokens)]
                score = jnp.logaddexp(jnp.logaddexp(score, one), two)
            score = score + emissions[t]
        return -jax.nn.logsumexp(score[-2:])

    with jax.ensure_compile_time_eval():  # lengths and labels are concrete, logits may be traced
        feasible = is_feasible(labels, label_lengths, logit_lengths).tolist()
    zero = jnp.zeros((), logits.dtype)
    sizes = zip(map(int, logit_lengths), map(int, label_lengths), feasible, strict=True)
    return jnp.stack(
        [
            one(logits[i], frames, labels[i], count) if fits and frames else zero
            for i, (frames, count, fits) in enumerate(sizes)
        ]
    )


def _emissions(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Of [b, t, v] the scores of an alignment's states, blank, label, ..., label, blank.

    For labels int [b, u], float32 [b, t, 2u + 1], or as many as `_computed` says. By products with
    one-hot rows, since gathering would scatter in the backward pass; accelerators round them by
    default.
    """
    size = log_probs.shape[2]
    if devices.platform():
        # One product for all: interleaving what two give is copies of it there.
        one_hot = jax.nn.one_hot(_states(labels, _computed(labels)), size)
        return jnp.einsum("btv,bsv->bts", log_probs, one_hot, precision="highest")
    one_hot = jax.nn.one_hot(labels, size)
    of_labels = jnp.einsum("btv,buv->btu", log_probs, one_hot, precision="highest")
    blank = log_probs[:, :, BLANK, None]
    pairs = jnp.stack([jnp.broadcast_to(blank, of_labels.shape), of_labels], axis=-1)
    return jnp.concatenate([pairs.reshape(*blank.shape[:2], -1), blank], axis=-1)


def _computed(labels: jax.Array) -> int:
    """How many states there are: an alignment's, and blanks that fill up a TPU's registers."""
    states = 2 * labels.shape[1] + 1
    if devices.platform() != "tpu":
        return states
    from fedasr.kernels import ctc_accelerated  # Pallas takes a second to import

    return ctc_accelerated.filled(states)


def _states(labels: jax.Array, size: int) -> jax.Array:
    """The tokens of states, blank, label, ..., label, blank, and blanks to fill up: int [b, s]."""
    b, u = labels.shape
    pairs = jnp.stack([jnp.full_like(labels, BLANK), labels], axis=-1)
    rest = ((0, 0), (0, size - 2 * u))
    return jnp.pad(pairs.reshape(b, 2 * u), rest, constant_values=BLANK)


def _jumps(labels: jax.Array, size: int) -> jax.Array:
    """Where the state before the last may be left out: a label after another that it differs from.

    Of labels int [b, u], bool [b, s].
    """
    b, u = labels.shape
    differ = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))[:, :u]
    pairs = jnp.stack([jnp.zeros_like(differ), differ], axis=-1)  # a scatter would be two launches
    return jnp.pad(pairs.reshape(b, 2 * u), ((0, 0), (0, size - 2 * u)))


def _streamed_log_likelihood(log_probs, logit_lengths, labels, label_lengths, feasible):
    """`_log_likelihood`, whose scores of states are read from [b, t, v] frame by frame."""
    tokens = _states(labels, 2 * labels.shape[1] + 1)
    states = 2 * jnp.where(feasible, label_lengths, 0) + 1
    frames = jnp.where(feasible, logit_lengths, 0)
    state = jnp.arange(tokens.shape[1])
    jumps = _jumps(labels, tokens.shape[1])
    there, penalty = state < states[:, None], jnp.where(jumps, 0.0, _NEVER)
    first = jnp.broadcast_to(jnp.where(state < 2, 0.0, _NEVER), tokens.shape)

    def step(carry, frame):
        score, offset = carry
        number, of_frame = frame
        emission = jnp.where(there, jnp.take_along_axis(of_frame, tokens, axis=1), _NEVER)
        most = jnp.max(emission, axis=1, keepdims=True)
        real = (number < frames)[:, None]
        score = jnp.where(real, _advance(score, emission - most, penalty), score)
        return (score, offset + jnp.where(real, most, 0)), None

    by_frame = jnp.arange(log_probs.shape[1]), jnp.moveaxis(log_probs, 1, 0)
    start = first, jnp.zeros((len(labels), 1), log_probs.dtype)
    (after, offset), _ = jax.lax.scan(step, start, by_frame)
    return _at_last(after, states) + offset[:, 0]


@jax.custom_vjp
def _log_likelihood(
    emissions: jax.Array, jumps: jax.Array, frames: jax.Array, states: jax.Array
) -> jax.Array:
    """Log of the summed probability of all paths through the states: float32 [b].

    A path begins in one of the first two states, ends in one of the last two, and stays or goes on
    by one state, or by two where `jumps` says so, from frame to frame. The derivative by an
    emission is the state's posterior probability (Graves et al., 2006, equation 14): one loop walks
    forwards and backwards at once, and there is nothing left for the backward pass to do.

    Args:
      emissions: float32 [b, t, s]. jumps: bool [b, s], whether the state before the last may be
        left out. frames, states: int [b], how many are true.
    """
    emissions, offset, first, _, inside = _prepared(emissions, frames, states)
    after, _ = _walk(first, jnp.moveaxis(emissions, 1, 0), jumps, inside)
    return _at_last(after, states) + offset


def _log_likelihood_forward(emissions, jumps, frames, states):
    emissions, offset, first, last, inside = _prepared(emissions, frames, states)
    after, posterior = _posteriors(emissions, first, last, jumps, frames, inside)
    return _at_last(after, states) + offset, posterior


def _posteriors(emissions, first, last, jumps, frames, inside):
    """The scores after the last frame [b, s], and posteriors of states [b, t, s].

    A device that has a kernel for it (`ctc_accelerated`) is given that.
    """
    if kind := devices.platform():
        from fedasr.kernels import ctc_accelerated  # Pallas takes a second to import

        return ctc_accelerated.posteriors(kind, emissions, first, last, jumps, frames)
    by_frame = jnp.moveaxis(emissions, 1, 0)
    # Backwards in time and in states is the same walk.
    from_end = jnp.pad(jumps, ((0, 0), (0, 2)))[:, :1:-1]
    after, before = _walk(
        jnp.stack([first, last[:, ::-1]]),
        jnp.stack([by_frame, by_frame[::-1, :, ::-1]], axis=1),
        jnp.stack([jumps, from_end]),
        jnp.stack([inside, inside[::-1]], axis=1),
    )
    # Summed over states, exp of this is the likelihood in every frame: but for rounding, which
    # would grow with the scores.
    joint = before[:, 0] + by_frame + before[::-1, 1, :, ::-1]
    posterior = jnp.where(inside, jax.nn.softmax(joint, axis=-1), 0)
    return after[0], jnp.moveaxis(posterior, 0, 1)


def _log_likelihood_backward(posterior, gradient):
    return posterior * gradient[:, None, None], None, None, None


_log_likelihood.defvjp(_log_likelihood_forward, _log_likelihood_backward)


def _prepared(emissions, frames, states):
    """What the walks need.

    Returns:
      emissions [b, t, s] relative to each frame's largest, for the sake of rounding, and the sum of
      those [b]; scores [b, s] of states where paths begin and end; and which frames are true
      [t, b, 1].
    """
    state, inside = jnp.arange(emissions.shape[2]), jnp.arange(emissions.shape[1]) < frames[:, None]
    to_end = states[:, None] - 1 - state
    emissions = jnp.where((to_end >= 0)[:, None], emissions, _NEVER)
    most = jnp.max(emissions, axis=2)
    first = jnp.broadcast_to(jnp.where(state < 2, 0.0, _NEVER), to_end.shape)
    last = jnp.where((to_end == 0) | (to_end == 1), 0.0, _NEVER)
    offset = jnp.sum(jnp.where(inside, most, 0), axis=1)
    return emissions - most[..., None], offset, first, last, inside.T[..., None]


def _walk(start, emissions, jumps, inside):
    """Sums over paths, frame by frame; a frame that is not inside is passed over.

    Args:
      start: [..., s], score of being about to enter a state. emissions: [t, ..., s]. jumps: [...,
        s]. inside: [t, ..., 1].

    Returns:
      The score after the last frame, and before each frame, [t, ..., s].
    """
    penalty = jnp.where(jumps, 0.0, _NEVER)

    def step(score, frame):
        emission, real = frame
        return jnp.where(real, _advance(score, emission, penalty), score), score

    return jax.lax.scan(step, start, (emissions, inside))


def _advance(score, emission, penalty):
    """The scores [..., s] after a frame with these emissions; `penalty` is that of jumps."""
    nowhere = jnp.full((*score.shape[:-1], 2), _NEVER)
    # Materialised: reading through the concatenation keeps XLA from vectorising the rest.
    padded = jax.lax.optimization_barrier(jnp.concatenate([nowhere, score + emission], axis=-1))
    here, one, two = padded[..., 2:], padded[..., 1:-1], padded[..., :-2] + penalty
    most = jnp.maximum(jnp.maximum(here, one), two)
    sum = jnp.exp(here - most) + jnp.exp(one - most) + jnp.exp(two - most)
    return most + jnp.log(sum)


def _at_last(score, states):
    """The score [b] after the last true state: of paths that have left it or the one before."""
    last = jnp.arange(score.shape[1]) == states[:, None] - 1
    return jnp.sum(jnp.where(last, score, 0), axis=1)


def greedy_decode(logits: jax.Array, logit_lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best class of every frame, with repeats collapsed and then blanks removed.

    Args:
      logits: float [b, t, v].
      logit_lengths: int [b], true frames.

    Returns:
      tokens int32 [b, t], padded with 0, and their number int32 [b].
    """
    frames = logits.shape[1]
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    previous = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=BLANK)
    inside = jnp.arange(frames) < logit_lengths[:, None]
    keep = (best != BLANK) & (best != previous) & inside
    return compact(best, keep)


def compact(tokens: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the tokens to keep to the front, in their order.

    Args:
      tokens: int [b, n]. keep: bool [b, n].

    Returns:
      tokens int32 [b, n], padded with 0, and their number int32 [b].
    """
    # A stable sort of "dropped".
    order = jnp.argsort(~keep, axis=1, stable=True)
    lengths = keep.sum(axis=1, dtype=jnp.int32)
    tokens = jnp.take_along_axis(tokens, order, axis=1).astype(jnp.int32)
    return jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, BLANK), lengths
