"""What is the sender like? A column of the data's metadata, such as accent or gender.

The attacker knows the updates of other users and what those users are like; the guess is the value
whose users' mean update is nearest. Success is the share of senders of whom it is right.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedasr.attacks.matching import Halves, halves, releases, result
from fedasr.attacks.results import Result
from fedasr.attacks.speaker import scale_of, scores
from fedasr.attacks.target import Settings, Target
from fedasr.data.listing import read_listing


def columns(target: Target, users: Sequence[str]) -> dict[str, list[str]]:
    """Each column's value for each user: those that all users have, with at least two of a value.

    A value that one user alone has could not be learned from others.
    """
    listed, _ = read_listing(target.data.directory, target.config.data.train)
    said = [
        dict(set.intersection(*(set(row.metadata.items()) for row in listed[user])))
        if listed.get(user)
        else {}
        for user in users
    ]
    names = set.intersection(*(set(one) for one in said)) if said else set()
    found = {name: [one[name] for one in said] for name in sorted(names)}
    return {
        name: values
        for name, values in found.items()
        if len(set(values)) > 1 and sum(n for n in Counter(values).values() if n > 1) > 2
    }


def attack(target: Target, settings: Settings, given: Halves | None = None) -> list[Result]:
    """Guesses each column of each sender; nothing where the data says nothing of its users."""
    users = given.users if given else None
    found = given or halves(target, settings)
    results = []
    for column, values in columns(target, users or found.users).items():
        kinds = np.array(values)
        known = np.array([(kinds == kind).sum() > 1 for kind in kinds])
        chance = max(Counter(kinds[known].tolist()).values()) / int(known.sum())
        for release in releases(target, settings, found.observed):
            plain = release.noise_multiplier is None
            enrolled = found.enrolled if plain else target.clipped(found.enrolled)
            scale = scale_of(enrolled, target.noise_of(release.noise_multiplier))
            right = guessed(enrolled * scale, release.seen * scale, kinds)[..., known]
            what = f"{column} named, of {len(set(kinds[known].tolist()))} values"
            results.append(result(target, f"attribute {column}", release, right, chance, what))
    return results


def guessed(enrolled: np.ndarray, seen: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Whether the nearest value is the sender's, whose own update is not among those compared.

    Args:
      enrolled: [users, n], known. seen: [draws, users, n]. kinds: [users], their values.

    Returns:
      bool [draws, users].
    """
    users, names = len(kinds), np.unique(kinds)
    right = np.zeros(seen.shape[:2], bool)
    for user in range(users):
        others = np.arange(users) != user
        there = [name for name in names if (others & (kinds == name)).any()]
        means = np.stack([enrolled[others & (kinds == name)].mean(0) for name in there])
        best = scores(means, seen[:, user]).argmax(-1)
        right[:, user] = np.array(there)[best] == kinds[user]
    return right
