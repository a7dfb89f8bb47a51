"""Who takes part in a round: stateless samplers that name the privacy event they implement.

A sampler is a frozen description. `cohort(round)` depends on nothing but the seed and the round, so
a resumed run meets the same users, and `event` states the subsampling that was really done, so an
epsilon cannot be claimed for another one.
"""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedasr.errors import UserError

# Keeps the samplers' random numbers apart from any others made from the same seed.
_STREAM = 0x5A3B1E
# Standard deviations above the mean cohort that get a slot: truncation then is so rare that it
# costs no privacy at delta 1e-9 (at 5.6 it would add about 2% to epsilon).
_SLOT_DEVIATIONS = 7.0


@runtime_checkable
class Sampler(Protocol):
    """Chooses the users of each round.

    Attributes:
      population: number of users to choose from.
      expected_cohort: mean number of users per round: what the server divides by.
      slots: largest number of users that any round can have.
      description: the sampling in words, for reports.
      neighboring_relation: the `dp_accounting.NeighboringRelation` under which `event` holds.
    """

    population: int
    expected_cohort: float
    slots: int

    @property
    def description(self) -> str: ...

    @property
    def neighboring_relation(self) -> Any: ...

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [<= slots], sorted; a pure function of (seed, round)."""
        ...

    def event(self, noise_multiplier: float) -> Any:
        """The `dp_accounting.DpEvent` of one round with Gaussian noise on the sum.

        Args:
          noise_multiplier: standard deviation of the noise on the sum over the clip norm.
        """
        ...


def _generator(seed: int, round: int) -> np.random.Generator:
    if round < 0:
        raise UserError(f"round must be 0 or more, not {round}.")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAM, round])))


def _check_counts(population: int, seed: int) -> None:
    if population != int(population) or population < 1:
        raise UserError(f"population must be a whole number of users, 1 or more, not {population}.")
    if seed != int(seed) or seed < 0:
        raise UserError(f"seed must be a whole number, 0 or more, not {seed}.")


def _is_noisy(noise_multiplier: float) -> bool:
    if not noise_multiplier >= 0:
        raise UserError(f"noise_multiplier must be 0 or more, not {noise_multiplier}.")
    return noise_multiplier > 0


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
    """Every user takes part independently with probability expected_cohort / population.

    A round that draws more users than there are slots keeps a uniformly random subset of them, and
    the event accounts for that (truncated Poisson subsampling, arXiv 2508.15089).

    Attributes:
      population: number of users.
      expected_cohort: mean cohort size, in (0, population]; need not be whole.
      seed: non-negative integer; rounds are independent for one seed.
      slots: bound on a round's users; None for mean + 7 standard deviations (at most population).

    Raises:
      UserError: if an argument is out of range.
    """

    population: int
    expected_cohort: float
    seed: int
    slots: int | None = None

    def __post_init__(self):
        _check_counts(self.population, self.seed)
        if not 0 < self.expected_cohort <= self.population:
            raise UserError(
                f"expected_cohort must be above 0 and at most the population of {self.population}, "
                f"not {self.expected_cohort}."
            )
        if self.slots is None:
            deviation = math.sqrt(self.expected_cohort * (1 - self.sampling_probability))
            slots = math.ceil(self.expected_cohort + _SLOT_DEVIATIONS * deviation)
            object.__setattr__(self, "slots", min(self.population, slots))
        if self.slots != int(self.slots) or not self.expected_cohort <= self.slots:
            raise UserError(
                f"slots must be a whole number, at least the expected cohort of "
                f"{self.expected_cohort}, not {self.slots}."
            )

    @property
    def sampling_probability(self) -> float:
        return self.expected_cohort / self.population

    @property
    def description(self) -> str:
        return f"Poisson, at most {self.slots} users"

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [<= slots], sorted; empty in an unlucky small round."""
        rng = _generator(self.seed, round)
        drawn = rng.binomial(self.population, self.sampling_probability)
        # Given their number, the users drawn are a uniform subset, and so is what truncation keeps.
        kept = min(int(drawn), self.slots)
        return np.sort(rng.choice(self.population, kept, replace=False, shuffle=False))

    def event(self, noise_multiplier: float) -> Any:
        """`TruncatedSubsampledGaussianDpEvent` of one round (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not _is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self.population,
            sampling_probability=self.sampling_probability,
            truncated_batch_size=self.slots,
            noise_multiplier=noise_multiplier,
        )


@dataclasses.dataclass(frozen=True)
class FixedSizeSampler:
    """Every round has exactly `cohort_size` different users, drawn uniformly.

    The guarantee is for replacing one user's data (the population is public), where one user can
    move the sum by twice the clip norm. dp_accounting counts noise in units of that sensitivity,
    so the event holds half the noise multiplier.

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
        _check_counts(self.population, self.seed)
        if self.cohort_size != int(self.cohort_size) or not 1 <= self.cohort_size <= (
            self.population
        ):
            raise UserError(
                f"cohort_size must be a whole number from 1 to the population of "
                f"{self.population}, not {self.cohort_size}."
            )

    @property
    def expected_cohort(self) -> float:
        return float(self.cohort_size)

    @property
    def slots(self) -> int:
        return self.cohort_size

    @property
    def description(self) -> str:
        return f"{self.cohort_size} users without replacement"

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.REPLACE_ONE

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [cohort_size], sorted."""
        rng = _generator(self.seed, round)
        return np.sort(rng.choice(self.population, self.cohort_size, replace=False, shuffle=False))

    def event(self, noise_multiplier: float) -> Any:
        """`SampledWithoutReplacementDpEvent` of one round (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not _is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.SampledWithoutReplacementDpEvent(
            source_dataset_size=self.population,
            sample_size=self.cohort_size,
            event=dp_accounting.GaussianDpEvent(noise_multiplier / 2),
        )
