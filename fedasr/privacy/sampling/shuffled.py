"""Users in turn: no chance decides, so nothing is amplified."""

import dataclasses
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy.sampling.draws import check_cohort_size, check_counts, is_noisy, turns
from fedasr.privacy.sampling.protocol import ZERO_OUT


@dataclasses.dataclass(frozen=True)
class ShuffledSampler:
    """Users take turns in one fixed random order: everyone is met equally often, evenly spaced.

    Round t takes the next `cohort_size` users of the order, round and round. No chance decides who
    takes part, so nothing is amplified; what limits a user is the number of participations, and
    their separation makes correlated noise worth its while (arXiv 2306.08153). With a cohort of
    everybody it is full participation, every round. The guarantee is for replacing one user's
    contribution by nothing (the order and its length are public).

    Attributes:
      population: number of users.
      cohort_size: users per round, in [1, population].
      seed: non-negative integer, of the order.

    Raises:
      UserError: if an argument is out of range.
    """

    population: int
    cohort_size: int
    seed: int

    def __post_init__(self):
        check_counts(self.population, self.seed)
        check_cohort_size(self.cohort_size, self.population)

    @property
    def expected_cohort(self) -> float:
        return float(self.cohort_size)

    @property
    def slots(self) -> int:
        return self.cohort_size

    @property
    def separation(self) -> int:
        return self.population // self.cohort_size

    @property
    def sensitivity(self) -> float:
        return 1.0

    @property
    def amplifies(self) -> bool:
        return False

    @property
    def overflow_probability(self) -> float:
        """0: a slot for everybody."""
        return 0.0

    @property
    def description(self) -> str:
        if self.cohort_size == self.population:
            return "everyone in every round"
        return f"{self.cohort_size} users in turn, {self.separation} rounds apart"

    @property
    def neighbours(self) -> str:
        return ZERO_OUT

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.REPLACE_SPECIAL

    def reseeded(self, seed: int) -> "ShuffledSampler":
        """See `Sampler`."""
        return dataclasses.replace(self, seed=seed)

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [cohort_size], sorted."""
        if round < 0:
            raise UserError(f"round must be 0 or more, not {round}.")
        places = (round * self.cohort_size + np.arange(self.cohort_size)) % self.population
        return np.sort(turns(self.population, self.seed)[places])

    def participations(self, rounds: int) -> int:
        """Turns of the users that come first."""
        return -(-rounds * self.cohort_size // self.population)

    def deployed(self, cohort: float, population: int) -> "ShuffledSampler":
        """See `Sampler`."""
        return ShuffledSampler(population, int(cohort), seed=0)

    def event(self, noise_multiplier: float) -> Any:
        """`GaussianDpEvent` of one participation (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.GaussianDpEvent(noise_multiplier)
