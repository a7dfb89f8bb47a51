"""Did this speaker train? Shadow trainings tell what the loss is like if they did, and if not.

The likelihood-ratio attack of Carlini and others (LiRA, arXiv 2112.03570) on users, at a small
scale: held-out speakers take part in short trainings by a fair coin each. Each training in turn is
the one that is attacked, all others are its shadows. Success is the share of (training, speaker)
that are told right.
"""

import numpy as np

from fedasr.attacks.results import Result
from fedasr.attacks.target import Settings, Target, choose_users
from fedasr.attacks.training import Users, multipliers, trained, training_result
from fedasr.streams import Stream, generator

_UTTERANCES = 4  # of a speaker


def coins(trainings: int, users: int, seed: int) -> np.ndarray:
    """Who is there: bool [trainings, users], each user as often as not, but for one training."""
    rng = generator(Stream.ATTACK, "coins", seed)
    half = np.arange(trainings) % 2 == 0
    return np.stack([rng.permutation(half) for _ in range(users)], 1)


def ratios(losses: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Log likelihood of presence over absence, each training judged by the others.

    Losses are taken for normal, with means of the speaker's own and a variance that all share, for
    few shadows say little of variances.

    Args:
      losses: float [trainings, users], of each user's speech. present: bool, likewise.

    Returns:
      float64 [trainings, users]; 0 where a user was always, or never, in the others.
    """
    found = np.zeros(losses.shape)
    for trial in range(len(losses)):
        others = np.arange(len(losses)) != trial
        values, here = losses[others], present[others]
        counts = np.stack([(~here).sum(0), here.sum(0)])
        sums = np.stack([(values * ~here).sum(0), (values * here).sum(0)])
        means = sums / np.maximum(counts, 1)
        spread = values - np.where(here, means[1], means[0])
        variance = (spread**2).sum() / max(spread.size - 2 * losses.shape[1], 1) + 1e-12
        away = (losses[trial] - means) ** 2
        known = (counts > 0).all(0)
        found[trial] = np.where(known, (away[0] - away[1]) / (2 * variance), 0.0)
    return found


def attack(target: Target, settings: Settings) -> list[Result]:
    """Tells who trained, by setting."""
    corpora = list(target.data.evaluation.values()) or [target.data.train]
    held_out = max(corpora, key=lambda corpus: len(corpus.users))
    chosen = choose_users(held_out, settings.users, settings.seed)
    users: Users = {
        f"{i:06d}": held_out.get(user, range(min(_UTTERANCES, int(held_out.sizes[user]))))
        for i, user in enumerate(chosen)
    }
    present = coins(settings.shadows, len(users), settings.seed)
    every = [example for examples in users.values() for example in examples]
    owner = np.repeat(np.arange(len(users)), [len(examples) for examples in users.values()])
    results = []
    for setting in multipliers(settings):
        losses = []
        for params in trained(target, settings, "membership", users, present, setting[1]):
            each = target.losses(params, every)
            each = np.where(np.isfinite(each), each, 0.0)
            losses.append(np.bincount(owner, each) / np.bincount(owner))
        right = (ratios(np.array(losses), present) > 0) == present
        what = f"presence of a speaker in a training, {settings.shadows} trainings"
        results.append(training_result(target, settings, "membership", setting, right, None, what))
    return results
