"""What attacks on single updates share: users' updates from two halves of their speech, released.

The attacker sees what the server would release of one round if the user alone were in it: the
update, clipped, with noise of a given multiplier. That is what is left of a large cohort for one
who knows all the others' updates. They also have other speech of every candidate and the model,
hence the update that each candidate would have sent.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fedasr.attacks.bounds import at_most
from fedasr.attacks.results import Result, clopper_pearson
from fedasr.attacks.roll_call import RollCall
from fedasr.attacks.target import Settings, Target, choose_users
from fedasr.data.corpus import InMemoryCorpus
from fedasr.models.recogniser import ARRAYS

DELTA = 1e-3  # of the epsilon that is told beside the success


class Halves(NamedTuple):
    """users: ids. enrolled, observed: updates from either half of their speech, [users, n]."""

    users: list[str]
    enrolled: np.ndarray
    observed: np.ndarray


class Release(NamedTuple):
    """What is seen of each user's update in a setting.

    setting: in words. noise_multiplier: None without clipping. seen: [draws, users, n].
    """

    setting: str
    noise_multiplier: float | None
    seen: np.ndarray


def halves(target: Target, settings: Settings) -> Halves:
    """Updates of the targets from the even and from the odd ones of their utterances."""
    train = target.data.train
    chosen = choose_users(train, settings.users, settings.seed)
    corpora = [
        InMemoryCorpus(
            {
                train.users[user]: train.get(user, range(first, int(train.sizes[user]), 2))
                for user in chosen
            },
            ragged=ARRAYS,
        )
        for first in (0, 1)
    ]
    found = [target.updates(corpus, f"half {i}") for i, corpus in enumerate(corpora)]
    return Halves([train.users[user] for user in chosen], *found)


def releases(target: Target, settings: Settings, updates: np.ndarray) -> Iterator[Release]:
    """The updates as they are, clipped, and clipped with each amount of noise."""
    yield Release("as they are", None, updates[None])
    clipped = target.clipped(updates)
    for multiplier in settings.noise:
        if not multiplier:
            yield Release("clipped", 0.0, clipped[None])
            continue
        seen = target.noised(clipped, multiplier, settings.seed, settings.draws)
        yield Release(f"noise {multiplier:.3g}", multiplier, seen)


def result(
    target: Target, name: str, release: Release, right: np.ndarray, chance: float, what: str
) -> Result:
    """From who was guessed right (bool, any shape) to a result.

    The interval takes the draws of the noise for independent, and the users.
    """
    multiplier = release.noise_multiplier
    mechanism = target.mechanism(RollCall.one(), multiplier)
    epsilon = mechanism.epsilon(1, DELTA).epsilon if multiplier else None
    return Result(
        attack=name,
        setting=release.setting,
        success=float(right.mean()),
        targets=int(right.size),
        interval=clopper_pearson(int(right.sum()), int(right.size)),
        chance=chance,
        bound=at_most(mechanism, 1, chance),
        noise_multiplier=multiplier,
        epsilon=epsilon,
        delta=DELTA if multiplier else None,
        what=what,
    )
