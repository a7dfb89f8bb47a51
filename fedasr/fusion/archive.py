"""The archive: a fixed number of models and their scores, as a pytree that stays on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedasr.fusion import competition
from fedasr.fusion.competition import Capacity

PyTree = Any


class Archive(NamedTuple):
    """Models side by side.

    params: the model's pytree, every leaf with a leading axis [slots].
    scores: float32 [slots, points]; zeros in an empty slot.
    filled: bool [slots].
    """

    params: PyTree
    scores: jax.Array
    filled: jax.Array


def empty(like: PyTree, slots: int, points: int) -> Archive:
    """An archive without models.

    Args:
      like: a model, or its shapes. slots: models that it holds at most. points: data points.
    """
    params = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), like)
    return Archive(params, jnp.zeros((slots, points)), jnp.zeros(slots, bool))


def clean(scores: jax.Array) -> jax.Array:
    """Scores at least 0: negative ones, and those of a broken model (not finite), count as 0."""
    return jnp.where(jnp.isfinite(scores), jnp.maximum(scores, 0.0), 0.0).astype(jnp.float32)


def loser(
    scores: jax.Array,
    filled: jax.Array,
    child: jax.Array,
    alpha: float = 1.0,
    capacity: Capacity = "max",
) -> jax.Array:
    """Who has to go when a child comes: int32, the number of slots for the child itself.

    The first empty slot, or the least shared fitness among all models and the child; of equals the
    first slot, so that a child replaces a model that is no better.

    Args:
      scores, filled: of the archive. child: float32 [points]. alpha, capacity: of the fitness.
    """
    everybody = jnp.concatenate([scores, child[None]])
    values = competition.fitness(everybody, alpha, capacity)
    return jnp.argmin(jnp.where(jnp.append(filled, True), values, -1.0)).astype(jnp.int32)


def replace(archive: Archive, slot: jax.Array, child: PyTree, scores: jax.Array) -> Archive:
    """Puts a child into a slot; a slot past the last leaves the archive as it is.

    Args:
      archive: it may be updated in place where it is donated or a loop's carry.
      slot: int32. child: a model. scores: its, float32 [points].
    """
    slots = archive.filled.shape[0]
    keep = slot >= slots
    place = jnp.minimum(slot, slots - 1)

    def write(values, new):
        # A select over one slot, not over the archive, which would be copied.
        return values.at[place].set(jnp.where(keep, values[place], new))

    return Archive(
        jax.tree.map(write, archive.params, child),
        write(archive.scores, scores),
        write(archive.filled, True),
    )


def best(archive: Archive) -> jax.Array:
    """The slot of the model with the highest mean score, int32."""
    return jnp.argmax(jnp.where(archive.filled, archive.scores.mean(1), -1.0)).astype(jnp.int32)


def take(archive: Archive, slot: jax.Array | int) -> PyTree:
    """The model in a slot."""
    return jax.tree.map(lambda x: x[slot], archive.params)
