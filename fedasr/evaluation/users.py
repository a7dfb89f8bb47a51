"""Error rates by user and by group of users, each with an interval over users."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedasr.evaluation import bootstrap
from fedasr.evaluation.alignment import characters_of, errors_of, words_of
from fedasr.evaluation.hypotheses import Hypothesis

UNKNOWN = "(not stated)"
WORST = 0.1  # share of the users in the worst decile
MOST_GROUPS = 40  # values of a column; one with more names people rather than groups
_MINUTES = (1.0, 3.0, 10.0, 30.0, 100.0)  # bounds of groups by training data


@dataclass
class UserErrors:
    """One user's errors in a split.

    Attributes:
      user: id. utterances: evaluated. words, characters: in the references.
      word_errors, char_errors: of the least-cost alignments.
      metadata: columns of which all the user's utterances say the same.
      training_minutes: of speech of theirs that was trained on; None if not known. 0 of an unseen
        user.
    """

    user: str
    utterances: int = 0
    words: int = 0
    characters: int = 0
    word_errors: int = 0
    char_errors: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    training_minutes: float | None = None

    @property
    def wer(self) -> float:
        """Percent; as if there were one word where there is none."""
        return 100.0 * self.word_errors / max(self.words, 1)

    @property
    def cer(self) -> float:
        """Percent; as if there were one character where there is none."""
        return 100.0 * self.char_errors / max(self.characters, 1)


def by_user(
    found: Iterable[Hypothesis], training_minutes: Mapping[str, float] | None = None
) -> list[UserErrors]:
    """Errors of every user, in the order of their ids.

    Args:
      found: utterances of one split.
      training_minutes: of every user who trained; None if that is not known.
    """
    users: dict[str, UserErrors] = {}
    said: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for one in found:
        user = users.setdefault(one.user, UserErrors(one.user))
        user.utterances += 1
        user.words += len(words_of(one.reference))
        user.characters += len(characters_of(one.reference))
        user.word_errors += errors_of(one.words())
        user.char_errors += errors_of(one.characters())
        for column, value in one.metadata.items():
            said[one.user][column].add(value)
    for name, user in users.items():
        columns = said[name].items()
        user.metadata = {column: min(v) for column, v in columns if len(v) == 1}
        if training_minutes is not None:
            user.training_minutes = float(training_minutes.get(name, 0.0))
    return [users[name] for name in sorted(users)]


def columns_of(users: Sequence[UserErrors]) -> dict[str, list[str]]:
    """Groups of users by column: each user's value, `UNKNOWN` where there is none.

    Beside the columns of the metadata "training data" (minutes of it) and "seen in training". A
    column of one value, or of so many that it names people, makes no groups.
    """
    names = sorted({column for user in users for column in user.metadata})
    columns = {name: [user.metadata.get(name) or UNKNOWN for user in users] for name in names}
    known = [m for user in users if (m := user.training_minutes) is not None]
    if len(known) == len(users):
        columns["seen in training"] = ["seen" if value else "unseen" for value in known]
        columns["training data"] = [minutes_label(value) for value in known]
    return {name: values for name, values in columns.items() if _makes_groups(values)}


def _makes_groups(values: Sequence[str]) -> bool:
    """Whether users' values are several, but not so many that they name people."""
    return 1 < len(set(values)) <= min(MOST_GROUPS, max(2, len(values) // 2))


def minutes_label(minutes: float) -> str:
    """Which group by training data so many minutes are in."""
    if not minutes:
        return "none"
    bounds = (0.0, *_MINUTES, math.inf)
    low, high = next((a, b) for a, b in itertools.pairwise(bounds) if minutes <= b)
    if not low:
        return f"up to {high:g} min"
    return f"over {low:g} min" if math.isinf(high) else f"{low:g} to {high:g} min"


def _sorted_statistics(rates: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of users' rates in ascending order, [..., users], over the last axis."""
    count = rates.shape[-1]
    worst = math.ceil(WORST * count)
    levels = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    found = {"mean": rates.mean(-1)}
    found["sd"] = rates.std(-1, ddof=1) if count > 1 else np.full(rates.shape[:-1], np.nan)
    found |= {name: np.quantile(rates, level, axis=-1) for name, level in levels.items()}
    return found | {"worst_decile": rates[..., count - worst :].mean(-1)}


def statistics(users: Sequence[UserErrors], what: str = "wer", seed: int = 0) -> dict[str, Any]:
    """How the users' error rates lie.

    Args:
      users: of one split.
      what: "wer" or "cer".
      seed: of the bootstrap.

    Returns:
      {"users", "all", "mean", "sd", "p10", "p50", "p90", "worst_decile", "intervals"} in percent:
      "all" is all errors over all tokens, the others are of the users' own rates, each user once;
      "worst_decile" is the mean of the worst tenth of the users (at least one). "intervals" has
      (low, high) of each, at 95% by bootstrap over users; NaN for fewer than eight users.
    """
    errors, totals = _counts(users, what)
    rates = 100.0 * errors / np.maximum(totals, 1)
    if not len(users):
        return {"users": 0, "intervals": {}}
    counts = bootstrap.weights([len(users)], seed=seed)
    values = _sorted_statistics(np.sort(rates))
    replicated = _sorted_statistics(bootstrap.ordered(rates, counts))
    values["all"] = bootstrap.ratio(errors, totals, np.ones((1, len(users))))[0]
    replicated["all"] = bootstrap.ratio(errors, totals, counts)
    return {
        "users": len(users),
        **{name: float(value) for name, value in values.items()},
        "intervals": {
            name: bootstrap.interval(value, len(users)) for name, value in replicated.items()
        },
    }


def _counts(users: Sequence[UserErrors], what: str) -> tuple[np.ndarray, np.ndarray]:
    errors, tokens = ("word_errors", "words") if what == "wer" else ("char_errors", "characters")
    pairs = [(getattr(user, errors), getattr(user, tokens)) for user in users]
    return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)  # type: ignore[return-value]


def groups(
    users: Sequence[UserErrors], values: Sequence[str], what: str = "wer", seed: int = 0
) -> dict[str, Any]:
    """Error rates of groups of users, and the gap between the worst and the best.

    Args:
      users: of one split.
      values: the group of each.
      what: "wer" or "cer".
      seed: of the bootstrap, which draws users within their groups.

    Returns:
      {"groups": {value: {"users", "rate", "interval"}}, "gap", "gap_interval", "worst", "best"}.
      The rate is the mean of the users' rates in percent. The gap is between groups of at least two
      users who say what they are, the interval that of these two groups' difference; None where
      there are not two. The largest of many differences is large by chance alone: an interval that
      ends just above 0 says little where there are many groups.
    """
    rates = {}
    for value in sorted(set(values)):
        inside = [user for user, its in zip(users, values, strict=True) if its == value]
        errors, totals = _counts(inside, what)
        rates[value] = 100.0 * errors / np.maximum(totals, 1)
    counts = bootstrap.weights([len(x) for x in rates.values()], seed=seed)
    ends = np.cumsum([len(x) for x in rates.values()])
    replicated = {
        value: counts[:, end - len(x) : end] @ x / len(x)
        for (value, x), end in zip(rates.items(), ends, strict=True)
    }
    found: dict[str, Any] = {
        "groups": {
            value: {
                "users": len(x),
                "rate": float(x.mean()),
                "interval": bootstrap.interval(replicated[value], len(x)),
            }
            for value, x in rates.items()
        }
    }
    compared = [value for value, x in rates.items() if len(x) > 1 and value != UNKNOWN]
    if len(compared) < 2:
        return found | {"gap": None, "gap_interval": None, "worst": None, "best": None}
    worst = max(compared, key=lambda value: rates[value].mean())
    best = min(compared, key=lambda value: rates[value].mean())
    smaller = min(len(rates[worst]), len(rates[best]))
    return found | {
        "gap": float(rates[worst].mean() - rates[best].mean()),
        "gap_interval": bootstrap.interval(replicated[worst] - replicated[best], smaller),
        "worst": worst,
        "best": best,
    }
