"""Parts of corpora as corpora: shares of users, unions, utterances dealt out afresh.

All of them are views: nothing is copied but integer indices, and an example is read when asked for.

A *split expression* names a part of a prepared corpus:

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

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from fedasr.errors import UserError
from fedasr.streams import Stream, generator

if TYPE_CHECKING:
    from fedasr.data.corpus import Corpus, Example

# Part of the hash that orders users for shares. It is fixed: "train[:10%]" is the same everywhere.
SPLIT_SEED = 0
ALIASES = {
    "ls100": ("train_clean_100",),
    "ls860": ("train_clean_360", "train_other_500"),
    "ls960": ("train_clean_100", "train_clean_360", "train_other_500"),
}
_EXAMPLES_TAG = 0x5A7
_SHARE = r"(?:\[([^:\[\]]*):([^:\[\]]*)\]\s*)?"
_TERM = re.compile(r"\s*([A-Za-z][A-Za-z0-9_]*)\s*" + 2 * _SHARE)
_BOUND = re.compile(r"(\d+)|(\d+(?:\.\d+)?)\s*%")


# ------------------------------------------------------------------------- whole-corpus look-ups


class LazyUsers(Sequence[str]):
    """User ids, sorted, each made when asked for; equal to any sequence of the same ids.

    Args:
      size: number of users.
      get: index in [0, size) to user id.
    """

    def __init__(self, size: int, get: Callable[[int], str]) -> None:
        self._size, self._get = size, get

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._get(i) for i in range(*index.indices(self._size)))
        if not -self._size <= index < self._size:
            raise IndexError(f"user {index} of {self._size}")
        return self._get(int(index) % self._size)

    def __iter__(self) -> Iterator[str]:
        return map(self._get, range(self._size))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._size} users>"


def user_hash(user: str) -> int:
    """The first 64 bits of SHA-256 of the split seed and the user id: shares order users by it."""
    text = f"{SPLIT_SEED}:{user}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def user_hashes(corpus: Corpus) -> np.ndarray:
    """`user_hash` of every user, uint64 [num_users]; from the index of a corpus that holds it."""
    if hasattr(corpus, "user_hashes"):
        return corpus.user_hashes()
    return np.fromiter(map(user_hash, corpus.users), np.uint64, len(corpus.users))


def shared_users(first: Corpus, second: Corpus) -> tuple[str, ...]:
    """The ids of users who are in both corpora, sorted; a million users take about a second."""
    _, ours, theirs = np.intersect1d(
        user_hashes(first), user_hashes(second), assume_unique=True, return_indices=True
    )
    pairs = ((first.users[int(i)], second.users[int(j)]) for i, j in zip(ours, theirs, strict=True))
    return tuple(sorted(a for a, b in pairs if a == b))


def find_users(corpus: Corpus, others: Corpus) -> np.ndarray:
    """The index in `corpus` of every user of `others`, int64 [users]; -1 for those not in it."""
    _, ours, theirs = np.intersect1d(
        user_hashes(corpus), user_hashes(others), assume_unique=True, return_indices=True
    )
    found = np.full(len(others.users), -1, np.int64)
    found[theirs] = ours
    return found


def all_lengths(corpus: Corpus) -> dict[str, np.ndarray]:
    """Lengths of the ragged arrays of all examples: int32 [num_examples] by key, user after user.

    Taken from the corpus's own `all_lengths()` where it has one.

    Raises:
      UserError: a user gives no lengths of an array that others give.
    """
    if hasattr(corpus, "all_lengths"):
        return corpus.all_lengths()
    by_user = [corpus.lengths(user) for user in range(len(corpus.users))]
    keys = sorted({key for lengths in by_user for key in lengths})
    for user, lengths in zip(corpus.users, by_user, strict=True):
        if missing := [key for key in keys if key not in lengths]:
            raise UserError(f"user {user!r} gives no lengths of {missing}")
    return {key: np.concatenate([x[key] for x in by_user]).astype(np.int32) for key in keys}


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each user's examples begin among all examples, int64."""
    return np.cumsum(sizes) - sizes


def _rows(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenated ranges starts[i] ... starts[i] + counts[i] - 1."""
    return np.repeat(starts - _starts(counts), counts) + np.arange(int(counts.sum()))


def _check(index: int, size: int, what: str) -> int:
    # A negative or too large index would silently read another user's example.
    if not 0 <= index < size:
        raise IndexError(f"{what} {index} is not in [0, {size})")
    return int(index)


# ---------------------------------------------------------------------------------------- views


class UserSubset:
    """Some users of a corpus.

    Args:
      corpus: the whole.
      indices: of the users kept, in any order, each once.

    Raises:
      UserError: no user is left, or one is named twice.
    """

    def __init__(self, corpus: Corpus, indices: Sequence[int] | np.ndarray) -> None:
        self._corpus = corpus
        self._indices = np.sort(np.asarray(indices, np.int64))
        if not len(self._indices) or (np.diff(self._indices) == 0).any():
            raise UserError("a subset needs at least one user, and each once")
        _check(self._indices[0], len(corpus.users), "user")
        _check(self._indices[-1], len(corpus.users), "user")
        self.sizes = np.asarray(corpus.sizes)[self._indices]

    @property
    def users(self) -> LazyUsers:
        """User ids, sorted."""
        return LazyUsers(len(self._indices), self._user)

    def _user(self, user: int) -> str:
        return self._corpus.users[int(self._indices[user])]

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        return self._corpus.lengths(int(self._indices[_check(user, len(self.sizes), "user")]))

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """See `fedasr.data.corpus.Corpus`."""
        return self._corpus.get(int(self._indices[_check(user, len(self.sizes), "user")]), indices)

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `all_lengths`."""
        rows = _rows(_starts(np.asarray(self._corpus.sizes))[self._indices], self.sizes)
        return {key: values[rows] for key, values in all_lengths(self._corpus).items()}

    def user_hashes(self) -> np.ndarray:
        """See `user_hashes`."""
        return user_hashes(self._corpus)[self._indices]


class ExampleSubset:
    """Some examples of each user; users left without any are left out.

    Args:
      corpus: the whole.
      choose: from a user's hash and number of examples to the indices kept, ascending.

    Raises:
      UserError: no example is left.
    """

    def __init__(self, corpus: Corpus, choose: Callable[[int, int], np.ndarray]) -> None:
        pairs = zip(user_hashes(corpus), corpus.sizes, strict=True)
        kept = [choose(int(user), int(size)) for user, size in pairs]
        users = [user for user, rows in enumerate(kept) if len(rows)]
        if not users:
            raise UserError("a subset needs at least one utterance")
        self._corpus = UserSubset(corpus, users)
        self._kept = [np.asarray(kept[user], np.int64) for user in users]
        self.sizes = np.array([len(rows) for rows in self._kept])

    @property
    def users(self) -> LazyUsers:
        """User ids, sorted."""
        return self._corpus.users

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        return {k: v[self._kept[user]] for k, v in self._corpus.lengths(user).items()}

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """See `fedasr.data.corpus.Corpus`."""
        for index in indices:
            _check(index, int(self.sizes[_check(user, len(self.sizes), "user")]), "example")
        return self._corpus.get(user, self._kept[user][list(indices)].tolist())

    def user_hashes(self) -> np.ndarray:
        """See `user_hashes`."""
        return self._corpus.user_hashes()


class UnionCorpus:
    """Several corpora as one; a user of more than one has all their examples, in their order.

    Args:
      corpora: with the same arrays.

    Raises:
      UserError: no corpus, or other ragged arrays in one than in another.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        if not corpora:
            raise UserError("a union needs at least one corpus")
        ragged = [sorted(corpus.lengths(0)) for corpus in corpora]
        if any(keys != ragged[0] for keys in ragged):
            raise UserError(f"the parts of a union differ in their ragged arrays: {ragged}")
        self._corpora = tuple(corpora)
        ids = [user for corpus in corpora for user in corpus.users]
        counts = [len(corpus.users) for corpus in corpora]
        # Each corpus is sorted, so that this merges runs, and equal users stay in corpus order.
        order = sorted(range(len(ids)), key=ids.__getitem__)
        new = [True, *(ids[a] != ids[b] for a, b in itertools.pairwise(order))]
        self._order = np.asarray(order, np.int64)
        self._part = np.repeat(np.arange(len(corpora)), counts)[self._order]
        self._index = np.concatenate([np.arange(n) for n in counts])[self._order]
        self._first = np.append(np.flatnonzero(new), len(ids))  # of a user's members
        self._member_sizes = np.concatenate([corpus.sizes for corpus in corpora])[self._order]
        self.sizes = np.add.reduceat(self._member_sizes, self._first[:-1])

    @property
    def users(self) -> LazyUsers:
        """User ids, sorted."""
        return LazyUsers(len(self.sizes), self._user)

    def _user(self, user: int) -> str:
        member = self._first[user]
        return self._corpora[self._part[member]].users[int(self._index[member])]

    def _members(self, user: int) -> Iterator[tuple[Corpus, int]]:
        _check(user, len(self.sizes), "user")
        for member in range(self._first[user], self._first[user + 1]):
            yield self._corpora[self._part[member]], int(self._index[member])

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        parts = [corpus.lengths(index) for corpus, index in self._members(user)]
        if len(parts) == 1:
            return parts[0]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """See `fedasr.data.corpus.Corpus`."""
        members = list(self._members(user))
        if len(members) == 1:
            corpus, index = members[0]
            return corpus.get(index, indices)
        ends = np.cumsum([corpus.sizes[index] for corpus, index in members])
        examples = []
        for i in indices:
            member = int(np.searchsorted(ends, _check(i, ends[-1], "example"), side="right"))
            corpus, index = members[member]
            examples += corpus.get(index, [int(i - (ends[member - 1] if member else 0))])
        return examples

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `all_lengths`."""
        starts = _starts(np.concatenate([corpus.sizes for corpus in self._corpora]))
        rows = _rows(starts[self._order], self._member_sizes)
        parts = [all_lengths(corpus) for corpus in self._corpora]
        return {key: np.concatenate([part[key] for part in parts])[rows] for key in parts[0]}

    def user_hashes(self) -> np.ndarray:
        """See `user_hashes`."""
        hashes = np.concatenate([user_hashes(corpus) for corpus in self._corpora])
        return hashes[self._order][self._first[:-1]]


class ReshuffledCorpus:
    """The same users with the same numbers of examples, the examples dealt out afresh (IID).

    The control of arXiv 2310.00098: what users have of their own is gone, how much they have is
    not. Each example is dealt out exactly once; who gets it is a pure function of the seed.

    Args:
      corpus: where the examples are.
      seed: of the dealing, 0 or more.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        if seed < 0:
            raise UserError(f"the seed of reshuffling must be 0 or more, not {seed}")
        self._corpus = corpus
        self.sizes = np.asarray(corpus.sizes)
        self._ends = np.cumsum(self.sizes)
        rng = generator(Stream.RESHUFFLE, seed)
        self._rows = rng.permutation(int(self._ends[-1]))

    @property
    def users(self) -> Sequence[str]:
        """User ids, sorted: of the receivers, not of those who spoke."""
        return self._corpus.users

    def _sources(self, user: int) -> list[tuple[int, int]]:
        """(user, index) in the corpus of each of the user's examples."""
        end = self._ends[_check(user, len(self.sizes), "user")]
        rows = self._rows[end - self.sizes[user] : end]
        owners = np.searchsorted(self._ends, rows, side="right")
        places = rows - (self._ends - self.sizes)[owners]
        return [(int(u), int(i)) for u, i in zip(owners, places, strict=True)]

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        parts = [(self._corpus.lengths(owner), i) for owner, i in self._sources(user)]
        keys = parts[0][0]
        return {key: np.asarray([part[key][i] for part, i in parts], np.int32) for key in keys}

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """See `fedasr.data.corpus.Corpus`."""
        sources = self._sources(user)
        wanted = [sources[_check(i, len(sources), "example")] for i in indices]
        return [self._corpus.get(owner, [i])[0] for owner, i in wanted]

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `all_lengths`."""
        return {key: values[self._rows] for key, values in all_lengths(self._corpus).items()}

    def user_hashes(self) -> np.ndarray:
        """See `user_hashes`."""
        return user_hashes(self._corpus)


# ---------------------------------------------------------------------------------- expressions


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
