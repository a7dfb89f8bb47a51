"""Who sent this update? Each candidate's own is known from other speech of theirs.

Success is the share of updates whose sender is named at the first guess (compare arXiv 2104.07815,
whose attacker finds the speaker from features that are recovered from a gradient).
"""

from collections.abc import Iterable

import numpy as np

from fedasr.attacks.matching import Halves, halves, releases, result
from fedasr.attacks.results import Result
from fedasr.attacks.target import Settings, Target

_LEAST = 0.1  # of the mean variance: parameters in which nobody differs say little


def scale_of(enrolled: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """What brings parameters to a like spread, so that a few of them do not decide: [n].

    Args:
      enrolled: [candidates, n].
      noise: standard deviation of what is added to each parameter of what is seen.
    """
    variance = enrolled.var(0)
    return 1 / np.sqrt(variance + _LEAST * variance.mean() + noise**2 + 1e-30)


def scores(enrolled: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """How well each update that is seen fits each candidate: [..., seen, candidates].

    The projection onto the candidates' directions, without what all candidates have in common.

    Args:
      enrolled: [candidates, n], as they are sent.
      seen: [..., n].
    """
    common = enrolled.mean(0)
    directions = enrolled - common
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    return (seen - common) @ directions.T


def attack(target: Target, settings: Settings, given: Halves | None = None) -> list[Result]:
    """Names the sender of each update.

    Args:
      target, settings: see there.
      given: the users' updates, if they are computed already.
    """
    found = given or halves(target, settings)
    return list(identified(target, settings, found))


def identified(target: Target, settings: Settings, found: Halves) -> Iterable[Result]:
    """The results by setting; each half of a user's speech is what is known of them, in turn."""
    users = len(found.users)
    turns = (found.enrolled, found.observed), (found.observed, found.enrolled)
    sides = [(known, releases(target, settings, sent)) for known, sent in turns]
    for both in zip(*(seen for _, seen in sides), strict=True):
        right = []
        for (known, _), release in zip(sides, both, strict=True):
            plain = release.noise_multiplier is None
            enrolled = known if plain else target.clipped(known)
            scale = scale_of(enrolled, target.noise_of(release.noise_multiplier))
            guesses = scores(enrolled * scale, release.seen * scale).argmax(-1)
            right.append(guesses == np.arange(users))
        what = f"the sender named among {users} speakers"
        yield result(target, "speaker", both[0], np.stack(right), 1 / users, what)
