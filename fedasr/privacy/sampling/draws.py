"""What samplers share: draws by seed and round, and checks of their arguments."""

import functools

import numpy as np

from fedasr.errors import UserError
from fedasr.streams import Stream, generator


@functools.lru_cache(maxsize=4)
def turns(population: int, seed: int) -> np.ndarray:
    """A fixed random order of the users, int64 [population]; shared, so read-only."""
    order = generator(Stream.TURNS, seed).permutation(population)
    order.setflags(write=False)
    return order


def round_generator(seed: int, round: int) -> np.random.Generator:
    """What draws a round's users; raises UserError for a negative round."""
    if round < 0:
        raise UserError(f"round must be 0 or more, not {round}.")
    return generator(Stream.SAMPLING, seed, round)


def check_counts(population: int, seed: int) -> None:
    """Raises UserError where there are no users, or the seed is none."""
    if population != int(population) or population < 1:
        raise UserError(f"population must be a whole number of users, 1 or more, not {population}.")
    if seed != int(seed) or seed < 0:
        raise UserError(f"seed must be a whole number, 0 or more, not {seed}.")


def check_cohort_size(cohort_size: int, population: int) -> None:
    """Raises UserError for cohorts of one size that these users cannot make."""
    if cohort_size != int(cohort_size) or not 1 <= cohort_size <= population:
        raise UserError(
            f"cohort_size must be a whole number from 1 to the population of {population}, not "
            f"{cohort_size}."
        )


def is_noisy(noise_multiplier: float) -> bool:
    """Whether there is noise; raises UserError for less than none."""
    if not noise_multiplier >= 0:
        raise UserError(f"noise_multiplier must be 0 or more, not {noise_multiplier}.")
    return noise_multiplier > 0
