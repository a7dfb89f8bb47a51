"""Where examples come from: user ids, sizes and random access by user; and a corpus in memory.

Users are ordered for shares, and compared between corpora, by a hash of their ids.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedasr.errors import UserError

Example = Mapping[str, np.ndarray]
# Part of the hash that orders users for shares. It is fixed: "train[:10%]" is the same everywhere.
SPLIT_SEED = 0
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@runtime_checkable
class Corpus(Protocol):
    """Examples grouped by user; all examples have arrays of the same names, dtypes and ranks.

    A corpus may also have `all_lengths()` and `user_hashes()`, which say for all users at once
    what the functions of these names here otherwise ask for one by one.

    Attributes:
      users: user ids, sorted. A user's index in it identifies the user everywhere else.
      sizes: int64 [num_users], examples per user, each at least 1.
    """

    @property
    def users(self) -> Sequence[str]: ...

    @property
    def sizes(self) -> np.ndarray: ...

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """Length of axis 0 of each ragged array: int32 [sizes[user]] by key. Reads no example."""
        ...

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices` (each in [0, sizes[user])), in that order."""
        ...


def valid_split_name(name: str) -> bool:
    """Whether a split can have this name: letters, digits and underscores, but not "all"."""
    return bool(_SPLIT_NAME.fullmatch(name)) and name.lower() != "all"


def checked(index: int, size: int, what: str) -> int:
    """The index; raises IndexError where it is not in [0, size)."""
    # A negative or too large index would silently read another user's example.
    if not 0 <= index < size:
        raise IndexError(f"{what} {index} is not in [0, {size})")
    return int(index)


class InMemoryCorpus:
    """A corpus held in memory.

    Args:
      users: examples by user id. All examples have the same keys, dtypes and ranks.
      ragged: keys of the arrays whose axis 0 varies in length. By default those that are seen to
        vary; name them where a small corpus may have equal lengths by chance.

    Raises:
      UserError: no user, a user without examples, or examples that do not fit together.
    """

    def __init__(
        self, users: Mapping[str, Sequence[Example]], ragged: Sequence[str] | None = None
    ) -> None:
        if not users:
            raise UserError("the corpus has no users: give at least one")
        self.users: tuple[str, ...] = tuple(sorted(users))
        self._examples = []
        for user in self.users:
            if not len(users[user]):
                raise UserError(f"user {user!r} has no examples: leave the user out")
            self._examples.append(
                [{key: np.asarray(value) for key, value in ex.items()} for ex in users[user]]
            )
        self.sizes = np.asarray([len(examples) for examples in self._examples], np.int64)
        self.ragged = _ragged_keys(self.users, self._examples, ragged)
        self._lengths = [
            {key: np.asarray([len(ex[key]) for ex in examples], np.int32) for key in self.ragged}
            for examples in self._examples
        ]

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """Length of axis 0 of each ragged array: int32 [sizes[user]] by key."""
        return self._lengths[checked(user, len(self.users), "user")]

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices`, in that order."""
        examples = self._examples[checked(user, len(self.users), "user")]
        return [examples[checked(i, len(examples), "example")] for i in indices]


def _ragged_keys(
    users: Sequence[str],
    examples: Sequence[Sequence[Example]],
    ragged: Sequence[str] | None,
) -> tuple[str, ...]:
    """Checks that all examples fit together and returns the ragged keys, sorted."""
    first = examples[0][0]
    if ragged is not None and not set(ragged) <= set(first):
        raise UserError(f"ragged names {sorted(set(ragged) - set(first))}, which no example has")
    lengths: dict[str, set[int]] = {key: set() for key in first}
    for user, user_examples in zip(users, examples, strict=True):
        for example in user_examples:
            _check_like(example, first, user)
            for key, value in example.items():
                lengths[key].add(len(value) if value.ndim else -1)
    for key, values in lengths.items():
        _check_lengths(key, values, ragged)
    if ragged is None:
        ragged = [key for key, values in lengths.items() if len(values) > 1]
    return tuple(sorted(ragged))


def _check_lengths(key: str, lengths: set[int], ragged: Sequence[str] | None) -> None:
    """Raises UserError where the lengths of an array (-1: a scalar) are not those allowed."""
    if ragged is not None and (key in ragged) and -1 in lengths:
        raise UserError(f"{key!r} is a scalar and cannot be ragged")
    if len(lengths) > 1 and (-1 in lengths or (ragged is not None and key not in ragged)):
        raise UserError(f"{key!r} varies in length: name it in ragged")


def _check_like(example: Example, first: Example, user: str) -> None:
    """Raises UserError for an example that differs from the first in more than lengths."""
    if set(example) != set(first):
        raise UserError(
            f"an example of user {user!r} has the arrays {sorted(example)}, others have "
            f"{sorted(first)}: give all examples the same"
        )
    for key, value in example.items():
        if value.dtype != first[key].dtype or value.shape[1:] != first[key].shape[1:]:
            raise UserError(
                f"{key!r} of user {user!r} is {value.dtype}{list(value.shape)}, elsewhere "
                f"{first[key].dtype}{list(first[key].shape)}: only axis 0 may vary"
            )


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
