"""Parts of corpora as corpora: some users, some utterances, unions, utterances dealt out afresh.

All of them are views: nothing is copied but integer indices, and an example is read when asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedasr.data import recordings
from fedasr.data.corpus import Corpus, Example, LazyUsers, all_lengths, checked, user_hashes
from fedasr.errors import UserError
from fedasr.streams import Stream, generator

if TYPE_CHECKING:
    from fedasr.audio.features import LogMelConfig
    from fedasr.data.records import ArrayRecordCorpus


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
        checked(self._indices[0], len(corpus.users), "user")
        checked(self._indices[-1], len(corpus.users), "user")
        self.sizes = np.asarray(corpus.sizes)[self._indices]

    @property
    def users(self) -> LazyUsers:
        """User ids, sorted."""
        return LazyUsers(len(self._indices), self._user)

    def _user(self, user: int) -> str:
        return self._corpus.users[int(self._indices[user])]

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        return self._corpus.lengths(int(self._indices[checked(user, len(self.sizes), "user")]))

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """See `fedasr.data.corpus.Corpus`."""
        return self._corpus.get(int(self._indices[checked(user, len(self.sizes), "user")]), indices)

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.all_lengths`."""
        rows = _rows(_starts(np.asarray(self._corpus.sizes))[self._indices], self.sizes)
        return {key: values[rows] for key, values in all_lengths(self._corpus).items()}

    def user_hashes(self) -> np.ndarray:
        """See `fedasr.data.corpus.user_hashes`."""
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
            checked(index, int(self.sizes[checked(user, len(self.sizes), "user")]), "example")
        return self._corpus.get(user, self._kept[user][list(indices)].tolist())

    def user_hashes(self) -> np.ndarray:
        """See `fedasr.data.corpus.user_hashes`."""
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
        checked(user, len(self.sizes), "user")
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
            member = int(np.searchsorted(ends, checked(i, ends[-1], "example"), side="right"))
            corpus, index = members[member]
            examples += corpus.get(index, [int(i - (ends[member - 1] if member else 0))])
        return examples

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.all_lengths`."""
        starts = _starts(np.concatenate([corpus.sizes for corpus in self._corpora]))
        rows = _rows(starts[self._order], self._member_sizes)
        parts = [all_lengths(corpus) for corpus in self._corpora]
        return {key: np.concatenate([part[key] for part in parts])[rows] for key in parts[0]}

    def user_hashes(self) -> np.ndarray:
        """See `fedasr.data.corpus.user_hashes`."""
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
        end = self._ends[checked(user, len(self.sizes), "user")]
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
        wanted = [sources[checked(i, len(sources), "example")] for i in indices]
        return [self._corpus.get(owner, [i])[0] for owner, i in wanted]

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.all_lengths`."""
        return {key: values[self._rows] for key, values in all_lengths(self._corpus).items()}

    def user_hashes(self) -> np.ndarray:
        """See `fedasr.data.corpus.user_hashes`."""
        return user_hashes(self._corpus)


class FeaturesFromAudio:
    """A corpus of audio as one of features, which are computed when they are read.

    Args:
      corpus: holds "audio", int16 [samples] at the sample rate of `config`.
      config: parameters of the features.
    """

    def __init__(self, corpus: ArrayRecordCorpus, config: LogMelConfig) -> None:
        self._corpus, self._config = corpus, config
        self.metadata = corpus.metadata
        self.sizes = corpus.sizes

    @property
    def users(self) -> LazyUsers:
        """User ids, sorted."""
        return self._corpus.users

    def user_hashes(self) -> np.ndarray:
        """See `fedasr.data.corpus.user_hashes`."""
        return self._corpus.user_hashes()

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """Lengths of "features" (frames) and of the other ragged arrays: int32 [sizes[user]]."""
        return self._with_frames(self._corpus.lengths(user))

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.all_lengths`."""
        return self._with_frames(self._corpus.all_lengths())

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices`: "features" float16 [frames, mels] for "audio"."""
        return [self._with_features(example) for example in self._corpus.get(user, indices)]

    def _with_frames(self, lengths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        hop, frame = self._config.hop_samples, self._config.frame_samples
        frames = np.maximum(0, 1 + (lengths["audio"] - frame) // hop).astype(np.int32)
        others = {key: values for key, values in lengths.items() if key != "audio"}
        return {"features": frames, **others}

    def _with_features(self, example: Example) -> Example:
        from fedasr.audio.features import INT16_SCALE

        waveform = example["audio"].astype(np.float32) / np.float32(INT16_SCALE)
        features = recordings.log_mel_on_cpu(waveform, self._config).astype(np.float16)
        others = {key: value for key, value in example.items() if key != "audio"}
        return {"features": features, **others}


class AudioBlocks(FeaturesFromAudio):
    """A corpus of audio as one whose frames are blocks of 10 ms, for models that hear audio.

    Args:
      corpus, config: as of `FeaturesFromAudio`; a block is as long as a hop.
    """

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices`, with two arrays in place of "audio".

        "features" int16 [blocks, samples of a block], zeros after the last sample; "samples" int32,
        how many of these are true.
        """
        return [self._with_features(example) for example in self._corpus.get(user, indices)]

    def _with_frames(self, lengths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        blocks = -(-lengths["audio"] // self._config.hop_samples)
        others = {key: values for key, values in lengths.items() if key != "audio"}
        return {"features": blocks.astype(np.int32), **others}

    def _with_features(self, example: Example) -> Example:
        audio, block = example["audio"], self._config.hop_samples
        blocks = np.zeros((-(-len(audio) // block), block), np.int16)
        blocks.reshape(-1)[: len(audio)] = audio
        others = {key: value for key, value in example.items() if key != "audio"}
        return {"features": blocks, "samples": np.asarray(len(audio), np.int32), **others}


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each user's examples begin among all examples, int64."""
    return np.cumsum(sizes) - sizes


def _rows(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenated ranges starts[i] ... starts[i] + counts[i] - 1."""
    return np.repeat(starts - _starts(counts), counts) + np.arange(int(counts.sum()))
