"""The archive: a fixed number of models and their scores, as a pytree that stays on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError
from fedasr.fusion import competition
from fedasr.fusion.competition import Capacity

PyTree = Any


class Archive(NamedTuple):
    """Models side by side.

    params: the model's pytree, every leaf with a leading axis [slots].
    scores: float32 [slots, points]; zeros in an empty slot.
    filled: bool [slots].
    lowest: float32, the least score that any model has had, or 0: see `refuse_negative`.
    """

    params: PyTree
    scores: jax.Array
    filled: jax.Array
    lowest: Any = 0.0


def empty(like: PyTree, slots: int, points: int) -> Archive:
    """An archive without models.

    Args:
      like: a model, or its shapes. slots: models that it holds at most. points: data points.
    """
    params = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), like)
    scores, filled = jnp.zeros((slots, points)), jnp.zeros(slots, bool)
    return Archive(params, scores, filled, jnp.zeros((), jnp.float32))


def clean(scores: jax.Array) -> jax.Array:
    """Scores at least 0: negative ones, and those of a broken model (not finite), count as 0."""
    return jnp.where(jnp.isfinite(scores), jnp.maximum(scores, 0.0), 0.0).astype(jnp.float32)


def lowest(scores: jax.Array) -> jax.Array:
    """The least of a model's finite scores if it is below 0, else 0: float32.

    Args:
      scores: as the task gave them, of any shape.
    """
    found = jnp.where(jnp.isfinite(scores), scores, 0.0).astype(jnp.float32)
    return jnp.min(found, initial=0.0)


def refuse_negative(lowest: Any) -> None:
    """Says that scores may not be negative: they count as 0, so that a search would be blind.

    Args:
      lowest: the least scores that models have had, of any shape.

    Raises:
      UserError: if one is below 0.
    """
    if (least := float(np.min(lowest))) < 0:
        raise UserError(
            f"a model has a score of {least:.6g}, but scores lie between 0 and 1: shift and scale "
            "them, such as exp(-loss) for a loss, or (score - worst) / (best - worst)"
        )


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
        archive.lowest,
    )


def best(archive: Archive) -> jax.Array:
    """The slot of the model with the highest mean score, int32."""
    return jnp.argmax(jnp.where(archive.filled, archive.scores.mean(1), -1.0)).astype(jnp.int32)


def take(archive: Archive, slot: jax.Array | int) -> PyTree:
    """The model in a slot."""
    return jax.tree.map(lambda x: x[slot], archive.params)
