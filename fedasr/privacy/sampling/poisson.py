"""Poisson sampling, truncated to slots, perhaps from groups that take turns."""

import dataclasses
from typing import Any, cast

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy.sampling.draws import check_counts, is_noisy, round_generator, turns
from fedasr.privacy.sampling.protocol import ZERO_OUT

# Largest chance of a full round with the default slots. A user can meet truncation in full rounds
# only, so that over T rounds it costs at most T times this in delta: for ten thousand rounds a
# hundredth of a delta of 1e-12. (Standard deviations are no measure: the tails of small cohorts
# are far from normal, seven of them tripled epsilon for a cohort of one.)
_FULL_ROUND = 1e-18


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
        check_counts(self.population, self.seed)
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
        # Of everybody, rounding may take it above 1.
        return min(1.0, self.expected_cohort * self.cycle / self.population)

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
        return ZERO_OUT

    @property
    def neighboring_relation(self) -> Any:
        import dp_accounting

        return dp_accounting.NeighboringRelation.REPLACE_SPECIAL

    def reseeded(self, seed: int) -> "PoissonSampler":
        """See `Sampler`."""
        return dataclasses.replace(self, seed=seed)

    def cohort(self, round: int) -> np.ndarray:
        """User indices of a round, int64 [<= slots], sorted; empty in an unlucky small round."""
        rng = round_generator(self.seed, round)
        group = None
        if self.cycle > 1:
            group = turns(self.population, self.seed)[round % self.cycle :: self.cycle]
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

        if not is_noisy(noise_multiplier):
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self._largest_group,
            sampling_probability=self.sampling_probability,
            truncated_batch_size=self.slots,
            noise_multiplier=noise_multiplier,
        )
