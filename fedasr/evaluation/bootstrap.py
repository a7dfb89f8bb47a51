"""Intervals by resampling users: who was evaluated is a sample of who could have been."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fedasr.streams import Stream, generator

REPLICATES = 2000
LEAST = 8  # users of an interval, which then covers 93%; of 5 it would cover 91%
Statistic = Callable[[np.ndarray], np.ndarray]


def weights(sizes: Sequence[int], replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """How often every user is drawn in every replicate.

    Users are drawn with replacement within their stratum, as many as there are.

    Args:
      sizes: users in each stratum, one behind the other.
      replicates: how many times.
      seed: of the draws.

    Returns:
      int64 [replicates, sum(sizes)].
    """
    rng = generator(Stream.BOOTSTRAP, seed, replicates, *map(int, sizes))
    parts = [rng.multinomial(n, np.full(n, 1 / n), size=replicates) for n in sizes if n]
    return np.concatenate(parts, 1) if parts else np.zeros((replicates, 0), np.int64)


def interval(replicated: np.ndarray, users: int, confidence: float = 0.95) -> tuple[float, float]:
    """Expanded percentile interval of a statistic's replicates.

    Percentiles alone are too narrow for few users, for the bootstrap's variance is n - 1 over n of
    the sample's, and a normal's tails are shorter than Student's. Their levels are moved out to
    Phi(-sqrt(n / (n - 1)) t) with t Student's quantile of n - 1 degrees of freedom
    (T. Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 4.1).

    Args:
      replicated: float [replicates]; NaN where a replicate has no value, which is left out.
      users: in the sample, n.
      confidence: of the interval.

    Returns:
      (low, high); NaN for fewer than eight users or no replicate.
    """
    from scipy import stats

    replicated = replicated[np.isfinite(replicated)]
    if users < LEAST or not len(replicated):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    reach = math.sqrt(users / (users - 1)) * stats.t.ppf(1 - tail, users - 1)
    level = float(stats.norm.cdf(-reach))
    low, high = np.quantile(replicated, [level, 1 - level])
    return float(low), float(high)


def ratio(errors: np.ndarray, totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """All errors over all tokens, in percent, of each replicate: float64 [replicates]."""
    return 100.0 * (counts @ errors) / np.maximum(counts @ totals, 1)


def ordered(rates: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The users' rates of each replicate in ascending order: float64 [replicates, users]."""
    order = np.argsort(rates, kind="stable")
    return np.stack([np.repeat(rates[order], row) for row in counts[:, order]])
