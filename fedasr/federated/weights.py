"""What users count in the sum, and what it is divided by."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.data.corpus import Corpus
from fedasr.federated.algorithms import Algorithm
from fedasr.federated.client import Params
from fedasr.federated.cohort import CohortSum
from fedasr.privacy.mechanism import Mechanism


def user_weights(corpus: Corpus, mechanism: Mechanism, algorithm: Algorithm) -> np.ndarray | None:
    """The users' weights, float32 [users]; None for 1."""
    if mechanism.weighting == "examples":
        return np.asarray(corpus.sizes, np.float32)
    return mechanism.check_weights(algorithm.weights, len(corpus.users))


def by_weight(mechanism: Mechanism) -> Callable[[CohortSum], Params]:
    """From a cohort's sum to what the server divides by the expected cohort.

    It makes that division one by the sum of weights.
    """
    expected = mechanism.sampler.expected_cohort
    return jax.jit(
        lambda total: jax.tree.map(
            lambda d: d * (expected / jnp.maximum(total.weight, 1.0)), total.delta
        )
    )
