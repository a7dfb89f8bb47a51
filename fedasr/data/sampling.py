"""Who takes part in a round: stateless samplers that name the privacy event they implement.

A sampler is a frozen description. `cohort(round)` depends on nothing but the seed and the round, so
a resumed run meets the same users, and `event` states the subsampling that was really done, so an
epsilon cannot be claimed for another one.
"""

import dataclasses
import functools
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from fedasr.errors import UserError
from fedasr.streams import Stream, generator

# Largest chance of a full round with the default slots. A user can meet truncation in full rounds
# only, so that over T rounds it costs at most T times this in delta: for ten thousand rounds a
# hundredth of a delta of 1e-12. (Standard deviations are no measure: the tails of small cohorts
# are far from normal, seven of them tripled epsilon for a cohort of one.)
_FULL_ROUND = 1e-18
_ZERO_OUT = "replace one user's contribution by nothing (the number of users is public)"


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


@functools.lru_cache(maxsize=4)
def _order(population: int, seed: int) -> np.ndarray:
    """A fixed random order of the users, int64 [population]; shared, so read-only."""
    order = generator(Stream.TURNS, seed).permutation(population)
    order.setflags(write=False)
    return order


def _generator(seed: int, round: int) -> np.random.Generator:
    if round < 0:
        raise UserError(f"round must be 0 or more, not {round}.")
    return generator(Stream.SAMPLING, seed, round)


def _check_counts(population: int, seed: int) -> None:
    if population != int(population) or population < 1:
        raise UserError(f"population must be a whole number of users, 1 or more, not {population}.")
    if seed != int(seed) or seed < 0:
        raise UserError(f"seed must be a whole number, 0 or more, not {seed}.")


def _chance_of_more(count: int, users: int, probability: float) -> float:
    """P(Binomial(users, probability) > count), exact in the far tail, too."""
    from scipy import special

    if count >= users:
        return 0.0
    return float(special.betainc(count + 1, users - count, probability))


def _default_slots(users: int, probability: float) -> int:
    """Fewest slots that the `users` - 1 others fill with a chance of at most `_FULL_ROUND`."""
    low, high = 1, users  # as many slots as users: no round is full without the last one
    while low < high:
        middle = (low + high) // 2
        if _chance_of_more(middle - 1, users - 1, probability) <= _FULL_ROUND:
            high = middle
        else:
            low = middle + 1
    return high


def _is_noisy(noise_multiplier: float) -> bool:
    if not noise_multiplier >= 0:
        raise UserError(f"noise_multiplier must be 0 or more, not {noise_multiplier}.")
    return noise_multiplier > 0


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
    """Every user takes part independently with probability expected_cohort / population.

    A round that draws more users than there are slots keeps a uniformly random subset of them, and
    the event accounts for that (truncated Poisson subsampling, arXiv 2508.15089).

    The guarantee is for one user's contribution replaced by nothing, with a public population: the
    probability of being drawn, the slots and the groups all follow from the number of users, so
    that one user more or less would move every other one. It holds both if the user is drawn and
    sends zero, and if the user is left out of the draw: the two differ in full rounds alone, where
    somebody else gets the slot, and the event covers either. It says nothing about hiding the
    number of users.

    Attributes:
      population: number of users.
      expected_cohort: mean cohort size, in (0, population]; need not be whole.
      seed: non-negative integer; rounds are independent for one seed.
      slots: bound on a round's users; None for the fewest with which a round is full with a chance
        of at most 1e-18 (all users, if they are few): truncation then costs nothing visible.
      cycle: 1, or b to deal the users into b fixed groups that take turns: round t samples from
        group t mod b (cyclic Poisson sampling, arXiv 2306.08153), as banded noise needs it. Who is
        in which group is taken to be public and not to depend on who else is there.

    Raises:
      UserError: if an argument is out of range.
    """

    population: int
    expected_cohort: float
    seed: int
    slots: int = cast(int, None)  # a number as soon as it is made
    cycle: int = 1

    def __post_init__(self):
        _check_counts(self.population, self.seed)
        if self.cycle != int(self.cycle) or not 1 <= self.cycle <= self.population:
            raise UserError(
                f"cycle must be a whole number of groups of users, 1 to {self.population}, "
                f"not {self.cycle}."
            )
        if not 0 < self.expected_cohort <= self.population / self.cycle:
            of = f" in {self.cycle} groups" if self.cycle > 1 else ""
            raise UserError(
                f"expected_cohort must be above 0 and at most the population of {self.population}"
                f"{of}, not {self.expected_cohort}."
            )
        if self.slots is None:
            slots = _default_slots(self._largest_group, self.sampling_probability)
            object.__setattr__(self, "slots", slots)
        if self.slots != int(self.slots) or not self.expected_cohort <= self.slots:
            raise UserError(
                f"slots must be a whole number, at least the expected cohort of "
                f"{self.expected_cohort}, not {self.slots}."
            )

    @property
    def sampling_probability(self) -> float:
        return self.expected_cohort * self.cycle / self.population

    @property
    def _largest_group(self) -> int:
        return -(-self.population // self.cycle)

    @property
    def separation(self) -> int:
        return self.cycle

    @property
    def sensitivity(self) -> float:
        return 1.0

    @property
    def amplifies(self) -> bool:
        return True

    @property
    def overflow_probability(self) -> float:
        """Chance that more users are drawn than there are slots, in the largest group."""
        return _chance_of_more(self.slots, self._largest_group, self.sampling_probability)

    @property
    def description(self) -> str:
        cyclic = f" from one of {self.cycle} groups in turn" if self.cycle > 1 else ""
        return f"Poisson{cyclic}, at most {self.slots} users"

    @property
    def neighbours(self) -> str:
        return _ZERO_OUT

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.REPLACE_SPECIAL

    def reseeded(self, seed: int) -> "PoissonSampler":
        """See `Sampler`."""
        return dataclasses.replace(self, seed=seed)

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [<= slots], sorted; empty in an unlucky small round."""
        rng = _generator(self.seed, round)
        group = None
        if self.cycle > 1:
            group = _order(self.population, self.seed)[round % self.cycle :: self.cycle]
        size = self.population if group is None else len(group)
        drawn = rng.binomial(size, self.sampling_probability)
        # Given their number, the users drawn are a uniform subset, and so is what truncation keeps.
        kept = min(int(drawn), self.slots)
        chosen = rng.choice(size, kept, replace=False, shuffle=False)
        return np.sort(chosen if group is None else group[chosen])

    def participations(self, rounds: int) -> int:
        """Rounds in which the user's group is sampled from."""
        return -(-rounds // self.cycle)

    def deployed(self, cohort: float, population: int) -> "PoissonSampler":
        """See `Sampler`; with the default number of slots, whose truncation is in the event."""
        return PoissonSampler(population, cohort, seed=0, cycle=self.cycle)

    def event(self, noise_multiplier: float) -> Any:
        """`TruncatedSubsampledGaussianDpEvent` of one round (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not _is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self._largest_group,
            sampling_probability=self.sampling_probability,
            truncated_batch_size=self.slots,
            noise_multiplier=noise_multiplier,
        )


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
        rng = _generator(self.seed, round)
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

        if not _is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.SampledWithoutReplacementDpEvent(
            source_dataset_size=self.population,
            sample_size=self.cohort_size,
            event=dp_accounting.GaussianDpEvent(noise_multiplier / self.sensitivity),
        )


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
        return _ZERO_OUT

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
        return np.sort(_order(self.population, self.seed)[places])

    def participations(self, rounds: int) -> int:
        """Turns of the users that come first."""
        return -(-rounds * self.cohort_size // self.population)

    def deployed(self, cohort: float, population: int) -> "ShuffledSampler":
        """See `Sampler`."""
        return ShuffledSampler(population, int(cohort), seed=0)

    def event(self, noise_multiplier: float) -> Any:
        """`GaussianDpEvent` of one participation (`NonPrivateDpEvent` without noise)."""
        import dp_accounting

        if not _is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.GaussianDpEvent(noise_multiplier)


@dataclasses.dataclass(frozen=True)
class SilentSampler:
    """Sampling of all users, of whom only some have anything to send; the others send nothing.

    Where it is private how many users have something, the probability of being drawn, the division
    and the epsilon may not follow from that number: they are those of the sampler of all users.

    Attributes:
      sampler: of all users.
      speaking: numbers of the users who have something, ascending.

    Raises:
      UserError: if a number is not of a user or they do not ascend.
    """

    sampler: Sampler
    speaking: tuple[int, ...]

    def __post_init__(self):
        pairs = zip((-1, *self.speaking), (*self.speaking, self.population), strict=True)
        if not all(a < b for a, b in pairs):
            raise UserError(f"speaking must be ascending numbers of {self.population} users.")

    @property
    def population(self) -> int:
        return self.sampler.population

    @property
    def expected_cohort(self) -> float:
        """Of all users, silent or not."""
        return self.sampler.expected_cohort

    @property
    def slots(self) -> int:
        return self.sampler.slots

    @property
    def seed(self) -> int:
        return getattr(self.sampler, "seed", 0)

    def reseeded(self, seed: int) -> "SilentSampler":
        """See `Sampler`."""
        return dataclasses.replace(self, sampler=self.sampler.reseeded(seed))

    @property
    def separation(self) -> int:
        return self.sampler.separation

    @property
    def sensitivity(self) -> float:
        return self.sampler.sensitivity

    @property
    def amplifies(self) -> bool:
        return self.sampler.amplifies

    @property
    def overflow_probability(self) -> float:
        return self.sampler.overflow_probability

    @property
    def description(self) -> str:
        return self.sampler.description

    @property
    def neighbours(self) -> str:
        return self.sampler.neighbours

    @property
    def neighboring_relation(self) -> Any:
        return self.sampler.neighboring_relation

    def cohort(self, round: int) -> np.ndarray:
        """Those of the users drawn who have something to send, int64 [<= slots], sorted."""
        drawn = self.sampler.cohort(round)
        return drawn[np.isin(drawn, self.speaking)]

    def participations(self, rounds: int) -> int:
        """See `Sampler`."""
        return self.sampler.participations(rounds)

    def deployed(self, cohort: float, population: int) -> Sampler:
        """See `Sampler`; nobody's silence is known there."""
        return self.sampler.deployed(cohort, population)

    def event(self, noise_multiplier: float) -> Any:
        """See `Sampler`."""
        return self.sampler.event(noise_multiplier)
