"""Users who differ as much as one likes: utterances dealt out unevenly, and how uneven that is.

Classes of utterances (words, voices, lengths) are dealt out by Dirichlet distributions (arXiv
1909.06335): each user's share of the classes is drawn from Dirichlet(alpha * shares of all), so
that alpha = infinity is IID and alpha = 0 gives a user one class. Numbers of utterances are dealt
out by log-normal weights.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedasr.data.corpus import Corpus, all_lengths
from fedasr.data.views import DealtCorpus
from fedasr.errors import UserError
from fedasr.streams import Stream, generator

KINDS = ("words", "voices", "lengths")
_LENGTH_CLASSES = 5  # of as many utterances each


def classes_of(corpus: Corpus, kind: str, decode: Callable[[np.ndarray], str]) -> np.ndarray:
    """The class of every utterance, counted over users in order, int64 [examples] from 0.

    Args:
      corpus: with "labels" and "features" or "audio".
      kind: "words": the first word of the transcript (which is read of every utterance); "voices":
        whose it is; "lengths": its fifth among all by length.
      decode: from labels to the transcript.

    Raises:
      UserError: for an unknown kind.
    """
    sizes = np.asarray(corpus.sizes)
    if kind == "voices":
        return np.repeat(np.arange(len(sizes)), sizes)
    if kind == "lengths":
        lengths = all_lengths(corpus)
        own = lengths["features"] if "features" in lengths else next(iter(lengths.values()))
        places = np.argsort(np.argsort(own, kind="stable"), kind="stable")
        return places * _LENGTH_CLASSES // len(own)
    if kind != "words":
        raise UserError(f"data.skew={kind!r} is unknown: choose one of {', '.join(KINDS)}")
    words = []
    for user, size in enumerate(sizes):
        for example in corpus.get(user, range(int(size))):
            words.append((decode(example["labels"]).split() or [""])[0])
    return np.unique(words, return_inverse=True)[1].astype(np.int64)


def skewed_sizes(sizes: Sequence[int] | np.ndarray, spread: float, seed: int) -> np.ndarray:
    """The same total dealt out by log-normal weights, at least one to each, int64 [users].

    Args:
      sizes: of the users now; with spread 0 they stay.
      spread: standard deviation of the weights' logarithm. seed: of the draws.
    """
    sizes = np.asarray(sizes, np.int64)
    if not spread:
        return sizes
    rng = generator(Stream.RESHUFFLE, seed, "sizes")
    weights = np.exp(spread * rng.standard_normal(len(sizes)))
    more = int(sizes.sum()) - len(sizes)
    exact = weights / weights.sum() * more
    whole = np.floor(exact).astype(np.int64)
    left = np.argsort(whole - exact, kind="stable")[: more - int(whole.sum())]
    whole[left] += 1
    return 1 + whole


def deal(classes: np.ndarray, sizes: np.ndarray, alpha: float, seed: int) -> np.ndarray:
    """Which utterances each user gets, int64 [examples]: see `DealtCorpus`.

    Users take turns in a random order, so that what is left at the end is left to all; a turn draws
    a class by the user's shares of those that are left.

    Args:
      classes: of every utterance. sizes: of every user, of the same total.
      alpha: above 0. seed: of the draws.
    """
    rng = generator(Stream.RESHUFFLE, seed, "deal")
    counts = np.bincount(classes)
    # Logarithms of gamma variables of a, which underflow for small a: gamma(a + 1) U^(1 / a).
    concentration = alpha * counts / len(classes)
    shape = len(sizes), len(counts)
    uniform = 1 - rng.random(shape)  # above 0
    logs = np.log(rng.gamma(concentration + 1, size=shape)) + np.log(uniform) / concentration
    piles = [rng.permutation(np.flatnonzero(classes == c)).tolist() for c in range(len(counts))]
    left = counts.copy()
    taken: list[list[int]] = [[] for _ in sizes]
    for user in rng.permutation(np.repeat(np.arange(len(sizes)), sizes)):
        wanted = np.where(left > 0, logs[user], -np.inf)
        total = np.cumsum(np.exp(wanted - wanted.max()))
        drawn = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        drawn = min(drawn, int(np.flatnonzero(left > 0)[-1]))
        taken[user].append(piles[drawn].pop())
        left[drawn] -= 1
    return np.concatenate([np.array(own, np.int64) for own in taken])


def skewed(
    corpus: Corpus, classes: np.ndarray, alpha: float, spread: float, seed: int
) -> DealtCorpus:
    """The corpus dealt out anew.

    Args:
      corpus: of the users. classes: of every utterance, see `classes_of`.
      alpha: of the classes' Dirichlet distributions, above 0.
      spread: see `skewed_sizes`. seed: of all draws.

    Raises:
      UserError: alpha or spread out of range.
    """
    if not 0 < alpha < np.inf or not 0 <= spread < np.inf:
        raise UserError(
            f"data.skew_alpha={alpha} must be above 0, data.quantity_skew={spread} from 0"
        )
    sizes = skewed_sizes(corpus.sizes, spread, seed)
    return DealtCorpus(corpus, deal(classes, sizes, alpha, seed), sizes)


def measure(classes: np.ndarray, sizes: Sequence[int] | np.ndarray) -> dict[str, float]:
    """How uneven users are.

    Args:
      classes: of the users' utterances, those of the first user first. sizes: of the users.

    Returns:
      "distance": the mean over users of the total variation distance between their classes and all
      (0 alike, 1 nothing in common); "iid_distance": the same where the utterances are dealt out at
      random (not 0, as users have few); "classes"; "gini" of the numbers of utterances (0 all have
      as many).
    """
    sizes = np.asarray(sizes, np.int64)
    shuffled = generator(Stream.RESHUFFLE, 0, "measure").permutation(classes)
    ordered = np.sort(sizes)
    users = len(sizes)
    weights = 2 * np.arange(1, users + 1) - users - 1
    return {
        "classes": int(classes.max()) + 1,
        "distance": _distance(classes, sizes),
        "iid_distance": _distance(shuffled, sizes),
        "gini": float((weights * ordered).sum() / (users * ordered.sum())),
    }


def _distance(classes: np.ndarray, sizes: np.ndarray) -> float:
    count = int(classes.max()) + 1
    overall = np.bincount(classes, minlength=count) / len(classes)
    ends = np.cumsum(sizes)
    own = [
        np.bincount(classes[end - size : end], minlength=count) / size
        for end, size in zip(ends, sizes, strict=True)
    ]
    return float(np.mean([np.abs(p - overall).sum() / 2 for p in own]))
