"""What a sampler is, and whom it compares."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

ZERO_OUT = "replace one user's contribution by nothing (the number of users is public)"


@runtime_checkable
class Sampler(Protocol):
    """Chooses the users of each round.

    Attributes:
      population: number of users to choose from.
      expected_cohort: mean number of users per round: what the server divides by.
      slots: largest number of users that any round can have.
      separation: a user who takes part in round t can next take part in round t + separation.
      sensitivity: how far one user can move the sum of clipped updates, in clip norms.
      amplifies: whether chance decides who takes part, so that `event` is a subsampled one.
      overflow_probability: chance that a round drops somebody who was drawn, for want of slots.
      description: the sampling in words, for reports.
      neighbours: what epsilon compares, in words: how one user's part is taken away.
      neighboring_relation: the `dp_accounting.NeighboringRelation` that `event` is given with.
    """

    @property
    def population(self) -> int: ...

    @property
    def expected_cohort(self) -> float: ...

    @property
    def slots(self) -> int: ...

    @property
    def separation(self) -> int: ...

    @property
    def sensitivity(self) -> float: ...

    @property
    def amplifies(self) -> bool: ...

    @property
    def overflow_probability(self) -> float: ...

    @property
    def description(self) -> str: ...

    @property
    def neighbours(self) -> str: ...

    @property
    def neighboring_relation(self) -> Any: ...

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [<= slots], sorted; a pure function of (seed, round)."""
        ...

    def event(self, noise_multiplier: float) -> Any:
        """The `dp_accounting.DpEvent`, for one user, of one round that the user may be in.

        Args:
          noise_multiplier: standard deviation of the noise on the sum over the clip norm.
        """
        ...

    def participations(self, rounds: int) -> int:
        """Most of the first `rounds` rounds that one user may be in."""
        ...

    def deployed(self, cohort: float, population: int) -> "Sampler":
        """The same kind of sampling of another size, to account for a deployment."""
        ...

    def reseeded(self, seed: int) -> "Sampler":
        """The same sampling with other draws; `seed` is a whole number from 0."""
        ...
