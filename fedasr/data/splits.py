"""Split expressions: names of parts of a prepared corpus.

* `train`: a stored split;
* `train[:10%]`, `train[10%:]`, `train[5%:10%]`, `train[:100]`: a share of its users, in percent or
  in number, in an order that a hash decides. The first x% of n users are floor(n x / 100), so that
  `[:10%]` and `[10%:]` have no user in common and together have all;
* `train[:][:75%]`, `train[:10%][75%:]`: of those users, a share of each one's utterances, in an
  order drawn by user; users for whom it comes to none are left out;
* `train_clean_360+train_other_500`: a union; a user of several parts is one user;
* `ls100`, `ls860`, `ls960`: LibriSpeech's usual training sets. A share of them is one of the union.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedasr.data.corpus import SPLIT_SEED, Corpus, user_hashes
from fedasr.data.views import ExampleSubset, UnionCorpus, UserSubset
from fedasr.errors import UserError

ALIASES = {
    "ls100": ("train_clean_100",),
    "ls860": ("train_clean_360", "train_other_500"),
    "ls960": ("train_clean_100", "train_clean_360", "train_other_500"),
}
_EXAMPLES_TAG = 0x5A7
_SHARE = r"(?:\[([^:\[\]]*):([^:\[\]]*)\]\s*)?"
_TERM = re.compile(r"\s*([A-Za-z][A-Za-z0-9_]*)\s*" + 2 * _SHARE)
_BOUND = re.compile(r"(\d+)|(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class _Bound:
    """An end of a share: `value` percent of the users (or utterances), or their number."""

    value: Fraction
    percent: bool

    def count(self, population: int) -> int:
        return int(population * self.value / 100) if self.percent else int(self.value)


@dataclass(frozen=True)
class _Term:
    """`name[start:stop][first:last]`; `text` is how it was written."""

    text: str
    name: str
    start: _Bound | None
    stop: _Bound | None
    first: _Bound | None
    last: _Bound | None

    def stored(self, splits: Collection[str]) -> tuple[str, ...]:
        """The stored splits it stands for: a stored name comes before a friendly one."""
        return (self.name,) if self.name in splits else ALIASES.get(self.name, (self.name,))


def _bound(text: str, expression: str) -> _Bound | None:
    if not text.strip():
        return None
    if not (found := _BOUND.fullmatch(text.strip())):
        raise UserError(
            f"{text.strip()!r} in the split {expression!r} is neither a number of users nor a "
            "percentage: write for example train[:10%]"
        )
    number, percent = found.groups()
    if percent and Fraction(percent) > 100:
        raise UserError(f"{text.strip()} in the split {expression!r} is more than 100%")
    return _Bound(Fraction(number or percent), percent is not None)


def _parse(expression: str) -> list[_Term]:
    terms = []
    for text in expression.split("+"):
        if not (found := _TERM.fullmatch(text)):
            raise UserError(
                f"{expression!r} is not a split: write train, train[:10%], train[10%:] or a union "
                "such as train_clean_360+train_other_500"
            )
        name, *shares = found.groups()
        bounds = [_bound(bound or "", expression) for bound in shares]
        terms.append(_Term(text.strip(), name, *bounds))
    return terms


def _missing(terms: Sequence[_Term], splits: Collection[str]) -> list[str]:
    return [name for term in terms for name in term.stored(splits) if name not in splits]


def stored_names(expression: str, splits: Collection[str]) -> list[str]:
    """The stored splits that an expression names, those that are not there left out.

    Raises:
      UserError: it is not a split expression.
    """
    names = itertools.chain(*(term.stored(splits) for term in _parse(expression)))
    return [name for name in dict.fromkeys(names) if name in splits]


def can_open(expression: str, splits: Collection[str]) -> bool:
    """Whether every split that an expression names is among the stored `splits`.

    Raises:
      UserError: it is not a split expression.
    """
    return not _missing(_parse(expression), splits)


def resolve(
    expression: str, splits: Collection[str], open_split: Callable[[str], Corpus], where: str
) -> Corpus:
    """The corpus that a split expression stands for.

    Args:
      expression: see the module's documentation.
      splits: names of the stored splits.
      open_split: opens one of them.
      where: the splits are, for messages.

    Raises:
      UserError: it is not a split expression, names an unknown split, holds no user, or would hold
        an utterance twice.
    """
    terms = _parse(expression)
    if missing := _missing(terms, splits):
        wanted = "" if expression == missing[0] else f" (for {expression!r})"
        raise UserError(
            f"{where} has no split {missing[0]!r}{wanted}: choose one of {', '.join(splits)}"
        )
    stored = [term.stored(splits) for term in terms]
    leaves = {name: open_split(name) for name in dict.fromkeys(itertools.chain(*stored))}
    parts = []
    for term, names in zip(terms, stored, strict=True):
        opened = [leaves[name] for name in names]
        parts.append(_share(opened[0] if len(opened) == 1 else UnionCorpus(opened), term))
    for i, j in itertools.combinations(range(len(terms)), 2):
        for name in set(stored[i]) & set(stored[j]):
            both = np.intersect1d(user_hashes(parts[i]), user_hashes(parts[j]))
            if twice := len(np.intersect1d(both, user_hashes(leaves[name]))):
                raise UserError(
                    f"{terms[i].text!r} and {terms[j].text!r} share {twice} users of {name!r}: "
                    "their utterances would count twice"
                )
    return parts[0] if len(parts) == 1 else UnionCorpus(parts)


def _share(corpus: Corpus, term: _Term) -> Corpus:
    corpus = _share_of_users(corpus, term)
    if term.first is None and term.last is None:
        return corpus

    def choose(user: int, size: int) -> np.ndarray:
        first = term.first.count(size) if term.first else 0
        last = term.last.count(size) if term.last else size
        rng = np.random.default_rng(np.random.SeedSequence([_EXAMPLES_TAG, SPLIT_SEED, user]))
        return np.sort(rng.permutation(size)[first:last])

    return ExampleSubset(corpus, choose)


def _share_of_users(corpus: Corpus, term: _Term) -> Corpus:
    if term.start is None and term.stop is None:
        return corpus
    population = len(corpus.users)
    start = term.start.count(population) if term.start else 0
    stop = term.stop.count(population) if term.stop else population
    if not 0 <= start < stop <= population:
        raise UserError(
            f"{term.text!r} asks for users {start} to {stop} of {population}: at least one, and no "
            "more than there are"
        )
    order = np.argsort(user_hashes(corpus), kind="stable")  # equal hashes: by user id
    return UserSubset(corpus, order[start:stop])
