"""Who is fit and who attracts whom, from scores on data points (arXiv 2508.16204).

Scores are float32 [models, points], at least 0 and at most 1: 0/1 (right or wrong) or anything
between. Every point is a resource of capacity c_j that models share in proportion to their scores.
An empty slot of an archive is a row of zeros, which changes nothing here.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fedasr.errors import UserError

Capacity = Literal["max", "one"]
CAPACITIES = ("max", "one")


def point_weights(scores: jax.Array, alpha: float = 1.0, capacity: Capacity = "max") -> jax.Array:
    """c_j / z_j^alpha with z_j = sum_k s(x_j|k): float32 [points]; 0 where nobody scores.

    Args:
      scores: [models, points].
      alpha: how much models compete; 0 is a plain genetic algorithm.
      capacity: "max": c_j is the best score of the point, so that a point that nobody solves well
        is worth little; for 0/1 scores it is 1 wherever it counts. "one": c_j = 1.

    Raises:
      UserError: for another capacity.
    """
    if capacity not in CAPACITIES:
        raise UserError(f"capacity must be one of {CAPACITIES}, not {capacity!r}")
    total = scores.sum(0)
    solved = total > 0
    worth = scores.max(0) if capacity == "max" else 1.0
    return jnp.where(solved, worth / jnp.where(solved, total, 1.0) ** alpha, 0.0)


def fitness(scores: jax.Array, alpha: float = 1.0, capacity: Capacity = "max") -> jax.Array:
    """f(i) = sum_j c_j s(x_j|i) / z_j^alpha: float32 [models].

    Args:
      scores, alpha, capacity: see `point_weights`.
    """
    # Not a matrix product: accelerators round those to fewer bits.
    return jnp.sum(scores * point_weights(scores, alpha, capacity), axis=-1)


def attraction(scores: jax.Array, chosen: jax.Array, capacity: Capacity = "max") -> jax.Array:
    """g(A, B) = sum_j c_j / z_j max(s(x_j|B) - s(x_j|A), 0) for all B: float32 [models].

    Args:
      scores, capacity: see `point_weights`.
      chosen: A, int32.
    """
    gains = jnp.maximum(scores - scores[chosen], 0.0)
    return jnp.sum(gains * point_weights(scores, 1.0, capacity), axis=-1)


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """An index with probability proportional to its weight: int32; never one of weight 0.

    Args:
      weights: float32 [models], at least 0, one of them above.
      uniform: float32 in [0, 1).
    """
    possible = weights > 0
    edges = jnp.cumsum(weights)
    # The last edge that can be drawn, so that rounding never leaves nothing.
    total = jnp.max(jnp.where(possible, edges, 0.0))
    point = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.float32(0.0)))
    return jnp.argmax(possible & (edges > point)).astype(jnp.int32)


def first_positive(*choices: jax.Array) -> jax.Array:
    """The first of several weight vectors that is not all zeros."""
    chosen = choices[-1]
    for weights in reversed(choices[:-1]):
        chosen = jnp.where(jnp.any(weights > 0), weights, chosen)
    return chosen


def coverage(scores: jax.Array) -> jax.Array:
    """Mean over points of the best model's score, in [0, 1]: the share that somebody solves."""
    return scores.max(0).mean()


def entropy(scores: jax.Array, filled: jax.Array) -> jax.Array:
    """How much models differ: mean over points of the binary entropy of their mean score, bits.

    0 if all models are right and wrong on the same points, 1 if half are right on every point.

    Args:
      scores: [models, points], zeros where not `filled`. filled: bool [models].
    """
    share = jnp.clip(scores.sum(0) / jnp.maximum(filled.sum(), 1), 0.0, 1.0)

    def term(p):
        return -p * jnp.log2(jnp.where(p > 0, p, 1.0))

    return jnp.mean(term(share) + term(1 - share))
