"""Two runs on the same utterances: who gains, who loses, and whether it is chance."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.evaluation import bootstrap
from fedasr.evaluation.alignment import words_of
from fedasr.evaluation.hypotheses import Hypothesis
from fedasr.evaluation.mapsswe import mapsswe
from fedasr.evaluation.users import UserErrors, by_user, columns_of, statistics
from fedasr.streams import Stream, generator

_PERMUTATIONS = 10_000
_EXACT = 12  # pairs of which all signs are tried


def matched(
    first: Sequence[Hypothesis], second: Sequence[Hypothesis]
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """The utterances that both have, in one order.

    They are known by split, user and number; where the references of one differ the data does.

    Raises:
      UserError: none is in both, one is there twice, or the references differ.
    """

    def by_name(found: Sequence[Hypothesis]) -> dict[tuple[str, str, int], Hypothesis]:
        named: dict[tuple[str, str, int], Hypothesis] = {}
        for hypothesis in found:
            name = hypothesis.split, hypothesis.user, hypothesis.utterance
            if name in named:
                raise UserError(
                    f"utterance {name[2]} of user {name[1]!r} in {name[0]!r} is there twice: "
                    'number each user\'s utterances ("utterance": 0, 1, ...)'
                )
            named[name] = hypothesis
        return named

    one, other = by_name(first), by_name(second)
    names = sorted(one.keys() & other.keys())
    if not names:
        raise UserError("the two runs have no utterance in common: evaluate both on the same split")
    for name in names:
        if words_of(one[name].reference) != words_of(other[name].reference):
            raise UserError(
                f"utterance {name[2]} of user {name[1]!r} in {name[0]!r} has other references in "
                "the two: evaluate both on the same data"
            )
    return [one[name] for name in names], [other[name] for name in names]


def permutation_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of the mean of paired differences, by flipping their signs.

    Args:
      differences: float [pairs]; all signs are tried of at most 12 that are not 0, else 10,000 are
        drawn, the observed one counting as one of them.
      seed: of the draws.
    """
    values = differences[differences != 0]
    if not len(values):
        return 1.0
    if len(values) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        extra = 0
    else:
        rng = generator(Stream.BOOTSTRAP, "signs", seed)
        signs = 1 - 2 * rng.integers(0, 2, (_PERMUTATIONS, len(values)))
        extra = 1
    reached = np.abs(signs @ values) >= abs(values.sum()) - 1e-12 * np.abs(values).sum()
    return float((reached.sum() + extra) / (len(signs) + extra))


def compare(
    first: Sequence[Hypothesis], second: Sequence[Hypothesis], seed: int = 0
) -> dict[str, Any]:
    """How the second run's word error rates differ from the first's, for one split.

    Args:
      first, second: utterances of one split each; those in both are compared.
      seed: of bootstrap and permutations.

    Returns:
      {"utterances", "users", "first", "second" (`fedasr.evaluation.users.statistics`),
      "difference" {"all", "mean", "intervals"} in points of percent, second less first,
      "gained", "lost", "equal" (numbers of users with fewer, more, as many errors), "sign_flip_p"
      (of the users' differences), "mapsswe" {"segments", "mean", "sd", "z", "p"} (first less
      second), "groups" {column: {value: {"users", "difference", "interval"}}}, "by_user" [{"user",
      "words", "first", "second", "difference"}] with those who lose most first}.

    Raises:
      UserError: see `matched`.
    """
    first, second = matched(first, second)
    users = by_user(first), by_user(second)
    rates = [np.array([user.wer for user in side]) for side in users]
    difference = rates[1] - rates[0]
    counts = bootstrap.weights([len(difference)], seed=seed)
    totals = np.array([user.words for user in users[0]], np.float64)
    errors = [np.array([user.word_errors for user in side], np.float64) for side in users]
    pooled = bootstrap.ratio(errors[1] - errors[0], totals, counts)
    edits = errors[1] - errors[0]
    tested = mapsswe((a.words(), b.words()) for a, b in zip(first, second, strict=True))
    count = len(difference)
    return {
        "utterances": len(first),
        "users": count,
        "first": statistics(users[0], seed=seed),
        "second": statistics(users[1], seed=seed),
        "difference": {
            "all": float(100.0 * edits.sum() / max(totals.sum(), 1)),
            "mean": float(difference.mean()),
            "intervals": {
                "all": bootstrap.interval(pooled, count),
                "mean": bootstrap.interval(counts @ difference / count, count),
            },
        },
        "gained": int((edits < 0).sum()),
        "lost": int((edits > 0).sum()),
        "equal": int((edits == 0).sum()),
        "sign_flip_p": permutation_p(difference, seed),
        "mapsswe": tested._asdict(),
        "groups": _by_group(users[0], difference, seed),
        "by_user": _listed(users, difference),
    }


def _by_group(users: Sequence[UserErrors], difference: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean difference of each group, by column."""
    found: dict[str, Any] = {}
    for column, values in columns_of(users).items():
        kinds = np.array(values)
        found[column] = {}
        for value in sorted(set(values)):
            inside = difference[kinds == value]
            counts = bootstrap.weights([len(inside)], seed=seed)
            found[column][value] = {
                "users": len(inside),
                "difference": float(inside.mean()),
                "interval": bootstrap.interval(counts @ inside / len(inside), len(inside)),
            }
    return found


def _listed(
    users: tuple[list[UserErrors], list[UserErrors]], difference: np.ndarray
) -> list[dict[str, Any]]:
    rows = [
        {
            "user": one.user,
            "words": one.words,
            "first": one.wer,
            "second": other.wer,
            "difference": float(change),
        }
        for one, other, change in zip(*users, difference, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row["difference"], row["user"]))


def in_words(found: dict[str, Any], names: tuple[str, str] = ("the first", "the second")) -> str:
    """What `compare` found, for people: a few lines."""
    first, second = found["first"], found["second"]
    change, test = found["difference"], found["mapsswe"]
    lines = [
        f"{found['utterances']} utterances of {found['users']} users; word error rate in percent",
        f"{'':24}{names[0][:20]:>21}{names[1][:20]:>21}",
    ]
    for key, name in (
        ("all", "all words"),
        ("mean", "mean over users"),
        ("worst_decile", "worst tenth of users"),
    ):
        lines.append(f"{name:24}{_with(first, key):>21}{_with(second, key):>21}")
    low, high = change["intervals"]["mean"]
    interval = f", 95% interval {low:+.1f} to {high:+.1f}" if math.isfinite(low) else ""
    lines += [
        f"difference of users' means: {change['mean']:+.1f} points{interval}",
        f"{found['gained']} users gain, {found['lost']} lose, {found['equal']} stay; sign-flip "
        f"test over users: p = {found['sign_flip_p']:.3g}",
        f"MAPSSWE: {test['segments']} segments, "
        + (
            "which differ all alike: nothing to judge by"
            if math.isnan(test["p"])
            else f"z = {test['z']:.2f}, p = {test['p']:.3g}"
        ),
    ]
    losers = [row for row in found["by_user"] if row["difference"] > 0][:5]
    for row in losers:
        lines.append(
            f"  loses: {row['user']}: {row['first']:.1f} -> {row['second']:.1f} "
            f"({row['words']} words)"
        )
    return "\n".join(lines)


def _with(found: dict[str, Any], key: str) -> str:
    low, high = found["intervals"].get(key, (math.nan, math.nan))
    return f"{found[key]:.1f} ({low:.1f}-{high:.1f})" if math.isfinite(low) else f"{found[key]:.1f}"
