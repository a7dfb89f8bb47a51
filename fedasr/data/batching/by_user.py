"""Batches of one user each, for central training with local parameters."""

from collections.abc import Sequence

import numpy as np

from fedasr.data.batching.arrays import write_example
from fedasr.data.batching.buckets import fitting_buckets, round_up
from fedasr.data.batching.types import Bucket, Padding
from fedasr.data.corpus import Corpus, all_lengths
from fedasr.streams import Stream, generator


class UserBatcher:
    """A user at random, each alike, and examples of theirs at random, for every step.

    As the published decoders of neural recordings are trained: a recording day is a user.

    Args:
      corpus: whose users.
      buckets: a batch is padded to the smallest that holds it.
      seed: of the draws. stream: that they belong to.
      batch_size: examples in a batch, drawn without replacement; all of the user's where they have
        fewer.
      multiple: batches are padded with masked examples to a multiple of this.
      select: names of the arrays that the loss needs; default all.
    """

    def __init__(
        self,
        corpus: Corpus,
        buckets: Sequence[Bucket],
        seed: int,
        *,
        batch_size: int,
        multiple: int = 1,
        select: Sequence[str] | None = None,
        stream: Stream = Stream.CENTRAL,
    ) -> None:
        self._corpus, self._buckets, self._seed = corpus, tuple(buckets), seed
        self._select, self._stream = select, stream
        self._sizes = np.asarray(corpus.sizes)
        self._batch_size = min(batch_size, int(self._sizes.max()))
        self._slots = round_up(self._batch_size, multiple)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._lengths = all_lengths(corpus)
        self._fitting = fitting_buckets(self._buckets, self._lengths, int(self._sizes.sum()))

    def _picked(self, step: int) -> tuple[int, np.ndarray]:
        """A step's user, and which of their examples."""
        rng = generator(self._stream, self._seed, step)
        user = int(rng.integers(len(self._sizes)))
        size = int(self._sizes[user])
        return user, rng.choice(size, min(self._batch_size, size), replace=False)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step`, a pure function of (seed, step), with "user", int32 [slots]."""
        user, rows = self._picked(step)
        bucket: Bucket = {}
        if self._buckets:
            bucket = self._buckets[int(self._fitting[self._starts[user] + rows].max())]
        batch: dict[str, np.ndarray] = {}
        for slot, example in enumerate(self._corpus.get(user, rows.tolist())):
            write_example(batch, (slot,), (self._slots,), example, bucket, self._select)
        batch["user"] = np.full(self._slots, user, np.int32)
        return batch

    def padding(self, steps: int) -> Padding:
        """How much of the first `steps` batches is real; see `PooledBatcher.padding`."""
        total, unit = Padding(0, 0), next(iter(self._buckets[0]), None) if self._buckets else None
        lengths = self._lengths.get(unit) if unit else None
        if unit is None or lengths is None:
            return total
        for step in range(steps):
            user, rows = self._picked(step)
            places = self._starts[user] + rows
            bucket = self._buckets[int(self._fitting[places].max())]
            total += Padding(int(lengths[places].sum()), self._slots * bucket[unit])
        return total
