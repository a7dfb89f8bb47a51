"""A sampler that takes those whom an attack says."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class RollCall:
    """Trials of so many rounds each, in all of which the users of the trial take part.

    The attack knows who may be there, so that no chance amplifies: epsilon compares a user's
    contribution with nothing, for the rounds of one trial.

    Attributes:
      presence: bool [trials, users]; round r is of trial r // rounds.
      rounds: of a trial.
      expected_cohort: what the server divides by.
    """

    presence: np.ndarray
    rounds: int
    expected_cohort: float

    @classmethod
    def one(cls) -> "RollCall":
        """One user, one round."""
        return cls(np.ones((1, 1), bool), 1, 1.0)

    seed = 0
    separation = 1
    sensitivity = 1.0
    amplifies = False
    overflow_probability = 0.0
    description = "those whom the attack names"
    neighbours = "replace one user's contribution by nothing (who may be there is public)"

    @property
    def population(self) -> int:
        return int(self.presence.shape[1])

    @property
    def slots(self) -> int:
        return max(1, int(self.presence.sum(1).max()))

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.REPLACE_SPECIAL

    def reseeded(self, seed: int) -> "RollCall":
        """The same: nothing is drawn."""
        del seed
        return self

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64, sorted."""
        return np.flatnonzero(self.presence[round // self.rounds])

    def participations(self, rounds: int) -> int:
        """All rounds of a trial."""
        return min(rounds, self.rounds)

    def event(self, noise_multiplier: float) -> Any:
        """`GaussianDpEvent` of one round (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not noise_multiplier:
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.GaussianDpEvent(noise_multiplier)

    def deployed(self, cohort: float, population: int) -> "RollCall":
        """Nothing of the kind is deployed."""
        del cohort, population
        return self
