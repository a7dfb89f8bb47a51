"""A sampler of all users where only some have anything to send."""

import dataclasses
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy.sampling.protocol import Sampler


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
