"""What an attack can do at most where the noise is what it is said to be."""

import math

import numpy as np

from fedasr.privacy.mechanism import Mechanism

_DELTAS = (1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2)


def _shift(mechanism: Mechanism, rounds: int) -> float | None:
    """How far one user moves all that is seen, in standard deviations of its noise.

    None where chance or correlation of rounds make it no single Gaussian.
    """
    if not mechanism.noise_multiplier:
        return math.inf
    special = (mechanism.correlation, mechanism.adaptive, mechanism.secure)
    if mechanism.sampler.amplifies or any(x is not None for x in special) or mechanism.released:
        return None
    turns = mechanism.sampler.participations(rounds)
    return math.sqrt(turns) * mechanism.sampler.sensitivity / mechanism.noise_multiplier


def at_most(mechanism: Mechanism, rounds: int, chance: float) -> float:
    """How often a guess can be right that would be right with probability `chance` without a user.

    Let a secret of a user be drawn, and let an attack name it from what `rounds` publish. If the
    user's contribution is replaced by nothing, what is seen is independent of the secret, so that
    the guess is right with at most the probability of the likeliest secret, `chance`. By
    (epsilon, delta)-privacy the user's contribution raises that to no more than
    e^epsilon chance + delta, for any pair that holds; the Gaussian mechanism's best pairs give
    Phi(Phi^-1(chance) + mu) with mu the sensitivity over the noise (Dong, Roth and Su, Gaussian
    Differential Privacy, arXiv 1905.02383).

    Args:
      mechanism: as it is claimed.
      rounds: that the attack sees.
      chance: in (0, 1).
    """
    from scipy import stats

    shift = _shift(mechanism, rounds)
    if shift is not None:
        return float(stats.norm.cdf(stats.norm.ppf(chance) + shift))
    pairs = [(mechanism.epsilon(rounds, delta).epsilon, delta) for delta in _DELTAS]
    return min(1.0, *(_exp(eps) * chance + delta for eps, delta in pairs))


def accuracy_at_most(mechanism: Mechanism, rounds: int) -> float:
    """How often a fair coin that decides whether a user is there can be told from what is seen.

    At most (e^epsilon + delta) / (1 + e^epsilon) for any pair; Phi(mu / 2) of Gaussian noise.

    Args:
      mechanism, rounds: see `at_most`.
    """
    from scipy import stats

    shift = _shift(mechanism, rounds)
    if shift is not None:
        return float(stats.norm.cdf(shift / 2))
    pairs = [(mechanism.epsilon(rounds, delta).epsilon, delta) for delta in _DELTAS]
    return min(1.0, *((1 + delta * _exp(-e)) / (1 + _exp(-e)) for e, delta in pairs))


def _exp(x: float) -> float:
    return float(np.exp(np.minimum(x, 700.0)))
