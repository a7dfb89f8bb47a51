"""Canaries whose updates are crafted, and the coins that say which are present."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.data.corpus import LazyUsers
from fedasr.errors import UserError
from fedasr.privacy import clipping
from fedasr.privacy.mechanism import Mechanism
from fedasr.streams import Stream, generator

_HEAVY_EVERY, _HEAVY_EXAMPLES = 5, 100
_LAYERS = ("first", "second", "third")


class CanaryCorpus:
    """Users of whom the first are canaries; nothing is stored but who is present when.

    An example is {"canary": int32 index, "presence": float32 [trials]}; the presence of users who
    are no canaries is zero.

    Args:
      presence: float32 [trials, canaries], what scales a canary's contribution.
      population: number of users, at least the canaries.
    """

    def __init__(self, presence: np.ndarray, population: int) -> None:
        self._presence = np.asarray(presence, np.float32)
        canaries = self._presence.shape[1]
        if not 1 <= canaries <= population:
            raise UserError(f"{canaries} canaries do not fit among {population} users")
        self.users = LazyUsers(population, lambda i: f"{i:012d}")
        self.sizes = np.ones(population, np.int64)
        self.sizes[:canaries:_HEAVY_EVERY] = _HEAVY_EXAMPLES

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """No array is ragged."""
        del user
        return {}

    def get(self, user: int, indices: Sequence[int]) -> list[Mapping[str, np.ndarray]]:
        """See `fedasr.data.corpus.Corpus`."""
        trials, canaries = self._presence.shape
        here = user < canaries
        presence = self._presence[:, user] if here else np.zeros(trials, np.float32)
        canary = np.asarray(user if here else 0, np.int32)
        return [{"canary": canary, "presence": presence} for _ in indices]


def canary_params(canaries: int) -> dict[str, jax.Array]:
    """Zeros for every canary in each of three layers: {name: float32 [canaries]}."""
    return {name: jnp.zeros(canaries, jnp.float32) for name in _LAYERS}


def for_canaries(mechanism: Mechanism, canaries: int) -> Mechanism:
    """The mechanism on the canaries' layers in place of a model: noise in shares depends on it."""
    if mechanism.secure is None:
        return mechanism
    secure = dataclasses.replace(mechanism.secure, dimension=len(_LAYERS) * canaries)
    return dataclasses.replace(mechanism, secure=secure)


def layer_weights(mechanism: Mechanism, params: Mapping[str, jax.Array]) -> dict[str, float]:
    """Share of the clip norm that a clipped canary has in each layer; the squares add up to 1."""
    if mechanism.budget == "global":
        return dict.fromkeys(params, 1 / math.sqrt(len(params)))
    bounds = clipping.layer_bounds(params, mechanism.clip_norm, mechanism.budget, lambda path: path)
    return dict(zip(sorted(params), (float(b) / mechanism.clip_norm for b in bounds), strict=True))


def crafted_update(weights: Mapping[str, float], length: float, rounds: int) -> Any:
    """A `fedasr.federated.client.ClientUpdate`: `length` along the canary's own coordinates.

    Args:
      weights: from `layer_weights`.
      length: L2 norm of the update of a canary that is present, before clipping.
      rounds: of a trial; round r belongs to trial r // rounds.
    """
    from fedasr.federated.client import ClientMetrics, take_batch

    def update(params, batches, num_steps, key, max_steps=None, round=0):
        del num_steps, key, max_steps
        batch = take_batch(batches, 0)
        presence = batch["presence"][0, round // rounds]
        canary = batch["canary"][0]
        delta = {
            name: jnp.zeros_like(leaf).at[canary].set(presence * (length * weights[name]))
            for name, leaf in params.items()
        }
        return delta, ClientMetrics(jnp.float32(0), {})

    return update


def publish() -> optax.GradientTransformation:
    """A server optimiser after which the parameters *are* the round's noisy mean."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.subtract, updates, params))


def toss(trials: int, canaries: int, method: str, seed: int) -> np.ndarray:
    """Who is present: bool [trials, canaries].

    Independent fair coins for `one_run`; for `many_runs`, which compares two fixed numbers of
    runs, one half of the trials, at random.
    """
    rng = generator(Stream.COINS, seed)
    if method == "one_run":
        return rng.random((trials, canaries)) < 0.5
    return rng.permutation(np.arange(trials) % 2 == 0)[:, None]


def default_canaries(mechanism: Mechanism, method: str) -> int:
    """Canaries of a run whose updates are crafted: one, or everybody, at most 1000."""
    return 1 if method == "many_runs" else min(mechanism.sampler.population, 1000)
