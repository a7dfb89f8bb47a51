"""Connectionist temporal classification: the loss, what it can align, and greedy decoding.

Graves et al., "Connectionist temporal classification", ICML 2006. The blank is class 0.
"""

import jax
import jax.numpy as jnp
import optax

BLANK = 0


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
    logits: jax.Array, logit_lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the labels, per utterance.

    Invariant to padding of every axis, whatever the padding holds. An utterance whose labels cannot
    be aligned with its frames (`is_feasible`) has loss exactly 0 and gradients exactly 0.

    Args:
      logits: float [b, t, v], unnormalised; computed in float32.
      logit_lengths: int [b], true frames.
      labels: int [b, u], each in 1..v-1 within its length.
      label_lengths: int [b], true labels.

    Returns:
      loss float32 [b] in nats, and feasible bool [b].
    """
    feasible = is_feasible(labels, label_lengths, logit_lengths)
    frame = jnp.arange(logits.shape[1]) < logit_lengths[:, None]
    # Zero what must not count before the loss, not after it: no NaN can then reach a gradient.
    valid = frame & feasible[:, None]
    logits = jnp.where(valid[:, :, None], logits.astype(jnp.float32), 0)
    label = jnp.arange(labels.shape[1]) < jnp.where(feasible, label_lengths, 0)[:, None]
    # The loss selects log-probabilities by a matrix product, which accelerators round by default.
    with jax.default_matmul_precision("highest"):
        loss = optax.ctc_loss(
            logits,
            1.0 - frame.astype(jnp.float32),
            labels,
            1.0 - label.astype(jnp.float32),
            blank_id=BLANK,
        )
    return jnp.where(feasible, loss, 0), feasible


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
