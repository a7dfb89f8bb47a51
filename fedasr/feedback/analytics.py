"""Federated analytics: which words users say, and how much they say, without anybody's data.

Each figure is a sum over users of vectors whose length is bounded, with Gaussian noise on every
number of it. What that costs the users is an event of its own, beside that of training: an entry of
the ledger (`ledger_entry`), or `Mechanism.released` of rounds that use what was found.

Words are found without a list of candidates by growing a tree of prefixes (as TrieHH does, arXiv
1902.08534): what enough users say with one more letter stays. TrieHH is private by sampling users
and keeping counts above a threshold; here all users answer at every level, with noise, so that the
guarantee is the Gaussian mechanism's whatever the population.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy import noise
from fedasr.privacy.ledger import Entry, Users
from fedasr.streams import Stream, seed_key

_END = "\n"  # after a word's last letter
_RELATION = "REPLACE_SPECIAL"  # a user's vector is replaced by zeros


class Vocabulary(NamedTuple):
    """Words that were found.

    words: about so many users hold each, noisy where there is noise.
    noise_multipliers: of the queries about all users, one for each level of the tree, for
      `ledger_entry` or `Mechanism.released`. Each is the standard deviation of the noise over
      sqrt(most), which is how far one user more or less moves a level's counts (L2).
    """

    words: dict[str, float]
    noise_multipliers: tuple[float, ...]


def chosen_words(
    said: Mapping[str, int], alphabet: str, most: int, longest: int
) -> tuple[str, ...]:
    """The words that a user reports: those said most often, at most `most` of them.

    They follow from the user's own words alone. Ties go by the alphabet.

    Args:
      said: occurrences by word. Words with other letters, or more of them than `longest`, are not
        reported, nor is the empty one.
      alphabet, most, longest: see `discover`.
    """
    letters = set(alphabet)
    fitting = [w for w, n in said.items() if 0 < len(w) <= longest and n > 0 and set(w) <= letters]
    return tuple(sorted(fitting, key=lambda word: (-said[word], word))[:most])


def level_counts(reported: Sequence[Sequence[str]], candidates: Sequence[str]) -> np.ndarray:
    """Of how many users' words each candidate is a beginning; a query with L2 sensitivity
    sqrt(most).

    Args:
      reported: of each user, `chosen_words`.
      candidates: distinct, all of one length; those of whole words end with a line feed.

    Returns:
      float64 [candidates], whole numbers.
    """
    place = {candidate: i for i, candidate in enumerate(candidates)}
    length = len(candidates[0]) if candidates else 0
    counts = np.zeros(len(candidates))
    for words in reported:
        own = {(word + _END)[:length] for word in words}
        counts[[place[prefix] for prefix in own if prefix in place]] += 1
    return counts


def threshold(noise_std: float, candidates: int, spurious: float, least: float = 1.0) -> float:
    """The count from which a candidate stays.

    Of candidates that nobody holds, `spurious` pass on average at most.

    Args:
      noise_std: of the counts. candidates: how many there are. spurious: above 0.
      least: no threshold is below it.
    """
    chance = min(spurious / max(candidates, 1), 0.5)
    return max(least, -noise_std * NormalDist().inv_cdf(chance))


def discover(
    said: Sequence[Mapping[str, int]],
    *,
    alphabet: str,
    most: int,
    noise_multiplier: float,
    longest: int = 12,
    spurious: float = 0.1,
    least: float = 2.0,
    seed: int = 0,
) -> Vocabulary:
    """Finds the words that many users say.

    Args:
      said: of each user, occurrences by word.
      alphabet: letters that words may have.
      most: words of one user that count at most; more find rarer words, and need more noise.
      noise_multiplier: see `Vocabulary`; 0 for exact counts.
      longest: letters of a word at most; there are so many levels and one, and all are charged,
        however early nothing is left.
      spurious: beginnings that nobody says and that stay at a level, on average at most.
      least: users who have to share a word in any case.
      seed: of the noise: one that no other query has, nor this one of other settings (see
        `fedasr.streams.sub_seed`).

    Raises:
      UserError: an argument out of range.
    """
    _check_noise(noise_multiplier)
    if most < 1 or longest < 1 or not spurious > 0 or not least > 0:
        raise UserError(
            f"most={most} and longest={longest} must be at least 1, spurious={spurious} and "
            f"least={least} above 0"
        )
    if not alphabet or _END in alphabet or len(set(alphabet)) < len(alphabet):
        raise UserError("the alphabet must have letters, each once, and no line feed")
    reported = [chosen_words(one, alphabet, most, longest) for one in said]
    std, levels = noise_multiplier * math.sqrt(most), longest + 1
    words: dict[str, float] = {}
    candidates = list(alphabet)
    for level in range(levels):
        counts = level_counts(reported, candidates)
        counts += _noise(std, noise_multiplier, len(candidates), seed, level)
        bound = threshold(std, len(candidates), spurious, least)
        kept = [(c, float(n)) for c, n in zip(candidates, counts, strict=True) if n >= bound]
        words |= {c.removesuffix(_END): n for c, n in kept if c.endswith(_END)}
        begun = [c for c, _ in kept if not c.endswith(_END)]
        # Words of the greatest length can only end.
        letters = (_END, *alphabet) if level + 1 < longest else (_END,)
        candidates = [prefix + letter for prefix in begun for letter in letters]
    return Vocabulary(words, (noise_multiplier,) * levels)


class Volumes(NamedTuple):
    """How much users say, and how long at a time.

    lengths: float64 [bins], users by the length of their utterances: each user's utterances share
      one unit among the bins.
    users: float64 [bins], users by their number of utterances.
    seconds: of speech, each user's up to a bound.
    noise_std: of every entry of the first two; of `seconds` it is so many times the bound.
    noise_multipliers: of the one query, see `Vocabulary`: noise_std over sqrt(3).
    """

    lengths: np.ndarray
    users: np.ndarray
    seconds: float
    noise_std: float
    noise_multipliers: tuple[float, ...]


def volume_vector(
    seconds: np.ndarray,
    length_edges: Sequence[float],
    count_edges: Sequence[float],
    most_seconds: float,
) -> np.ndarray:
    """A user's part of the sums: float64 [bins of lengths + bins of numbers + 1], L2 <= sqrt(3).

    Args:
      seconds: of each of the user's utterances. The others: see `volumes`.
    """
    lengths, users = np.zeros(len(length_edges) + 1), np.zeros(len(count_edges) + 1)
    if len(seconds):
        bins = np.searchsorted(length_edges, seconds, side="right")
        lengths += np.bincount(bins, minlength=len(lengths)) / len(seconds)
    users[np.searchsorted(count_edges, len(seconds), side="right")] = 1
    total = min(float(np.sum(seconds)), most_seconds) / most_seconds
    return np.concatenate([lengths, users, [total]])


def volumes(
    seconds: Sequence[np.ndarray],
    *,
    length_edges: Sequence[float] = (1, 2, 4, 8, 16),
    count_edges: Sequence[float] = (1, 10, 30, 100, 300),
    most_seconds: float = 600.0,
    noise_multiplier: float,
    seed: int = 0,
) -> Volumes:
    """Lengths of utterances and amounts of speech over all users, one query.

    Args:
      seconds: of each user, lengths of their utterances, [utterances], none negative.
      length_edges: ascending; bins of seconds are below the first, from one to the next, and from
        the last on. count_edges: likewise of the number of utterances. Neither may come from data.
      most_seconds: of a user that count in the total, above 0.
      noise_multiplier: see `Volumes`; 0 for exact sums.
      seed: see `discover`.

    Raises:
      UserError: an argument out of range, or a length that is negative or not finite.
    """
    _check_noise(noise_multiplier)
    for name, edges in (("length_edges", length_edges), ("count_edges", count_edges)):
        if not len(edges) or not (np.diff(edges) > 0).all() or not np.isfinite(edges).all():
            raise UserError(f"{name} must be finite numbers that ascend, not {tuple(edges)}")
    if not (math.isfinite(most_seconds) and most_seconds > 0):
        raise UserError(f"most_seconds must be finite and above 0, not {most_seconds}")
    if not all(np.isfinite(own).all() and (np.asarray(own) >= 0).all() for own in seconds):
        raise UserError("lengths of utterances must be finite seconds, 0 or more")
    size = len(length_edges) + len(count_edges) + 3
    total = np.zeros(size)
    for own in seconds:
        own = np.asarray(own, np.float64)
        total += volume_vector(own, length_edges, count_edges, most_seconds)
    std = noise_multiplier * math.sqrt(3)
    total += _noise(std, noise_multiplier, size, seed, _VOLUMES)
    lengths, users = total[: len(length_edges) + 1], total[len(length_edges) + 1 : -1]
    seconds_in_all = float(total[-1]) * most_seconds
    return Volumes(lengths, users, seconds_in_all, std, (noise_multiplier,))


def quantile(histogram: np.ndarray, edges: Sequence[float], share: float) -> float:
    """The edge up to which about a share of a noisy histogram lies; what is below 0 counts as 0.

    Args:
      histogram: [edges + 1]. edges: of its bins. share: in [0, 1].

    Returns:
      One of the edges, or infinity where the last bin is needed, or nothing is counted.
    """
    running = np.cumsum(np.maximum(histogram, 0))
    if not running[-1] > 0:
        return math.inf
    place = int(np.searchsorted(running, share * running[-1]))
    return float(edges[place]) if place < len(edges) else math.inf


def ledger_entry(
    name: str,
    noise_multipliers: Sequence[float],
    users: Users,
    deployments: Sequence[tuple[float, int]] = (),
) -> Entry:
    """What queries have cost the users, for the ledger; neighbours replace a user by nothing.

    Args:
      name: the ledger's for what was released.
      noise_multipliers: of all queries.
      users: who answered.
      deployments: (cohort, population) that the queries stand for: all of a population answer,
        with the same noise on shares of it.
    """

    def event(factor: float) -> Any:
        import dp_accounting

        return dp_accounting.ComposedDpEvent(
            [
                dp_accounting.GaussianDpEvent(z * factor)
                if z
                else dp_accounting.NonPrivateDpEvent()
                for z in noise_multipliers
            ]
        )

    return Entry(
        name,
        "analytics",
        len(noise_multipliers),
        event(1.0),
        _RELATION,
        "all users",
        users,
        tuple(
            ((cohort, population), event(population / max(users.count, 1)), _RELATION)
            for cohort, population in deployments
        ),
    )


_VOLUMES = 1 << 20  # no level of a tree


def _noise(
    std: float, noise_multiplier: float, size: int, seed: int, query: int
) -> np.ndarray | float:
    """Gaussian noise of a query, float64 [size]; 0 where there is none."""
    if not noise_multiplier or not size:
        return 0.0
    import jax

    key = jax.random.fold_in(seed_key(seed, Stream.ANALYTICS), query)
    reach = noise.released_reach(noise_multiplier)
    room = 1 << max(8, (size - 1).bit_length())  # few shapes: each is compiled
    return std * np.asarray(noise.standard_normal(key, room, reach), np.float64)[:size]


def _check_noise(noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise UserError(f"noise_multiplier must be finite and 0 or more, not {noise_multiplier}")
