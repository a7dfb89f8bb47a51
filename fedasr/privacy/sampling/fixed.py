"""Cohorts of one size, drawn without replacement."""

import dataclasses
from typing import Any

import numpy as np

from fedasr.privacy.sampling.draws import check_cohort_size, check_counts, is_noisy, round_generator
from fedasr.privacy.sampling.poisson import PoissonSampler


@dataclasses.dataclass(frozen=True)
class FixedSizeSampler:
    """Every round has exactly `cohort_size` different users, drawn uniformly.

    The guarantee is for replacing one user by any other, which moves the sum by up to twice the
    clip norm: a user who is drawn takes the place of another. dp_accounting counts noise in units
    of that sensitivity, so the event holds half the noise multiplier. (A user replaced by nothing
    still displaces others, so that no more can be claimed for that by the same theorem.)

    Attributes:
      population: number of users.
      cohort_size: users per round, in [1, population].
      seed: non-negative integer; rounds are independent for one seed.

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
        return 1

    @property
    def sensitivity(self) -> float:
        return 2.0

    @property
    def amplifies(self) -> bool:
        return True

    @property
    def overflow_probability(self) -> float:
        """0: a slot for everybody."""
        return 0.0

    @property
    def description(self) -> str:
        return f"{self.cohort_size} users without replacement"

    @property
    def neighbours(self) -> str:
        return "replace one user by any other"

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.REPLACE_ONE

    def reseeded(self, seed: int) -> "FixedSizeSampler":
        """See `Sampler`."""
        return dataclasses.replace(self, seed=seed)

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [cohort_size], sorted."""
        rng = round_generator(self.seed, round)
        return np.sort(rng.choice(self.population, self.cohort_size, replace=False, shuffle=False))

    def participations(self, rounds: int) -> int:
        """All of them."""
        return rounds

    def deployed(self, cohort: float, population: int) -> PoissonSampler:
        """Poisson sampling: a deployment has no reason for cohorts of one size."""
        return PoissonSampler(population, cohort, seed=0)

    def event(self, noise_multiplier: float) -> Any:
        """`SampledWithoutReplacementDpEvent` of one round (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.SampledWithoutReplacementDpEvent(
            source_dataset_size=self.population,
            sample_size=self.cohort_size,
            event=dp_accounting.GaussianDpEvent(noise_multiplier / self.sensitivity),
        )
