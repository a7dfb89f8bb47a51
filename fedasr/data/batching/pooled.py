"""Batches without clients: for central training, and for evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedasr.data.batching.arrays import write_example
from fedasr.data.batching.buckets import (
    fitting_bucket,
    fitting_buckets,
    make_buckets,
    round_up,
    rounded_slots,
)
from fedasr.data.batching.plan import pack
from fedasr.data.batching.types import Bucket, Padding
from fedasr.data.corpus import Corpus, all_lengths
from fedasr.errors import UserError
from fedasr.streams import Stream, generator


def eval_batches(
    corpus: Corpus,
    buckets: Sequence[Bucket],
    batch_size: int | Sequence[int],
    select: Sequence[str] | None = None,
    owners: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example of a corpus once, each bucket's in batches of equal shape (see "mask").

    `batch_size` may be one for each bucket: long examples, few of them together.

    With `owners` also "user" and "index", int32 [batch]: whose example it is, and which of theirs;
    -1 for padding.
    """
    sizes = np.asarray(corpus.sizes)
    ends = np.cumsum(sizes)
    fitting = fitting_buckets(buckets, all_lengths(corpus), int(ends[-1]))
    for number, bucket in enumerate(buckets or ({},)):
        rows = np.flatnonzero(fitting == number)
        size = batch_size if isinstance(batch_size, int) else batch_size[number]
        for start in range(0, len(rows), size):
            batches: dict[str, np.ndarray] = {}
            picked = rows[start : start + size]
            users = np.searchsorted(ends, picked, side="right")
            for slot, (user, row) in enumerate(zip(users, picked, strict=True)):
                example = corpus.get(int(user), [int(row - ends[user] + sizes[user])])[0]
                write_example(batches, (slot,), (size,), example, bucket, select)
            if owners:
                owned = {"user": users, "index": picked - ends[users] + sizes[users]}
                for name, numbers in owned.items():
                    batches[name] = np.full(size, -1, np.int32)
                    batches[name][: len(users)] = numbers
            yield batches


class PooledBatcher:
    """Batches of shuffled passes over all users' examples, for central training.

    With several buckets, the examples of a batch are of like length: those of a pass, shuffled, are
    put in the order of their buckets and cut into batches, which are shuffled again. One bucket
    leaves them as they were shuffled first.

    Args:
      corpus: its users are forgotten.
      buckets: a batch is padded to the smallest that holds it.
      seed: of the order. stream: that it belongs to.
      batch_size: examples in a batch; or
      frames: a batch holds about so many frames (see `pack`), counted in the array that the
        buckets name first.
      multiple: batches are padded with masked examples to a multiple of this.
      select: names of the arrays that the loss needs; default all.

    Raises:
      UserError: neither or both of batch_size and frames, or a window too short for an example.
    """

    def __init__(
        self,
        corpus: Corpus,
        buckets: Sequence[Bucket],
        seed: int,
        *,
        batch_size: int | None = None,
        frames: int | None = None,
        multiple: int = 1,
        select: Sequence[str] | None = None,
        stream: Stream = Stream.CENTRAL,
    ) -> None:
        if (batch_size is None) == (frames is None):
            raise UserError("set exactly one of the central batch size and batch frames")
        self._corpus, self._buckets, self._seed, self._select = corpus, tuple(buckets), seed, select
        self._frames, self._multiple, self._stream = frames, multiple, stream
        self._ends = np.cumsum(corpus.sizes)
        total = int(self._ends[-1])
        self._batch = total if batch_size is None else min(batch_size, total)
        self._slots = batch_size
        self._per_pass = total // self._batch
        if frames is not None:
            if not buckets:
                raise UserError("batches measured in frames need examples whose lengths vary")
            self._lengths = all_lengths(corpus)[next(iter(buckets[0]))].astype(np.int64)
            if frames < (longest := int(np.max(self._lengths))):
                raise UserError(f"a batch of {frames} frames is shorter than an example: {longest}")
            # Any order has at least so many batches; a short last one may be left out.
            self._per_pass = (int(self._lengths.sum()) - longest) // frames + 1
        self._fitting = None
        if len(self._buckets) > 1:
            self._fitting = fitting_buckets(self._buckets, all_lengths(corpus), total)
        self._order: tuple[int, list[np.ndarray]] | None = None

    @property
    def per_pass(self) -> int:
        """Batches of a pass over all examples (but for those that fill none)."""
        return self._per_pass

    def _pass(self, number: int) -> list[np.ndarray]:
        """The examples of each batch of a pass."""
        if self._order is None or self._order[0] != number:
            rng = generator(self._stream, self._seed, number)
            order = rng.permutation(int(self._ends[-1]))
            if not self._frames:
                order = order[: self._per_pass * self._batch]
            if self._fitting is not None:
                order = order[np.argsort(self._fitting[order], kind="stable")]
            if not self._frames:
                parts = list(order.reshape(self._per_pass, self._batch))
            elif self._fitting is None:
                parts = [order[part] for part in pack(self._lengths[order], self._frames)]
            else:
                parts = self._by_bucket(order, self._fitting, self._frames)
            if self._fitting is not None:
                parts = [parts[i] for i in rng.permutation(len(parts))]
            self._order = (number, parts)
        return self._order[1]

    def _by_bucket(self, order: np.ndarray, fitting: np.ndarray, frames: int) -> list[np.ndarray]:
        """Batches of as many examples as `frames` has room for, at least as many as a pass takes.

        `order` is by bucket. What is left of a bucket joins the next.
        """
        parts, left = [], order[:0]
        for number in range(len(self._buckets)):
            left = np.concatenate([left, order[fitting[order] == number]])
            room = self._room(number, frames)
            full = len(left) // room * room
            parts += list(left[:full].reshape(-1, room))
            left = left[full:]
        return parts if len(parts) >= self._per_pass else [*parts, left]

    def _room(self, bucket: int, frames: int) -> int:
        """How many examples of a bucket make a batch of `frames`."""
        room = max(1, frames // next(iter(self._buckets[bucket].values())))
        return room - room % self._multiple if room > self._multiple else room

    def padding(self, steps: int) -> Padding:
        """How much of the first `steps` batches is real, in the array that the buckets name first.

        Places without an example count as padding, too.
        """
        total = Padding(0, 0)
        if not self._buckets:
            return total
        unit = next(iter(self._buckets[0]))
        every = all_lengths(self._corpus)
        lengths = every.get(unit)
        if lengths is None:
            return total
        fitting = fitting_buckets(self._buckets, every, int(self._ends[-1]))
        for step in range(steps):
            number, first = divmod(step, self._per_pass)
            picked = self._pass(number)[first]
            bucket = int(fitting[picked].max())
            slots = self._slots_for(bucket, len(picked))
            total += Padding(int(lengths[picked].sum()), slots * self._buckets[bucket][unit])
        return total

    def _slots_for(self, bucket: int, count: int) -> int:
        slots = self._slots or rounded_slots(count)
        if self._frames and self._fitting is not None:
            slots = self._room(bucket, self._frames)  # one number for each bucket is one program
        return round_up(slots, self._multiple)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step`: a pure function of (seed, step)."""
        number, first = divmod(step, self._per_pass)
        picked = self._pass(number)[first]
        owners = np.searchsorted(self._ends, picked, side="right")
        places = [
            (int(user), int(index - (self._ends[user - 1] if user else 0)))
            for user, index in zip(owners, picked, strict=True)
        ]
        need = [
            fitting_bucket(
                self._buckets, {n: int(v[i]) for n, v in self._corpus.lengths(u).items()}
            )
            for u, i in places
            if self._buckets
        ]
        number = max(need, default=0)
        bucket = self._buckets[number] if need else {}
        slots = self._slots_for(number, len(places))
        batches: dict[str, np.ndarray] = {}
        for slot, (user, index) in enumerate(places):
            example = self._corpus.get(user, [index])[0]
            write_example(batches, (slot,), (slots,), example, bucket, self._select)
        return batches


def pooled_buckets(
    corpus: Corpus,
    *,
    padding: float,
    most: int,
    multiples: Mapping[str, int] | None = None,
    **batches: Any,
) -> tuple[dict[str, int], ...]:
    """As few buckets as keep the padding of a `PooledBatcher` below a share, or near its least.

    Args:
      corpus: to train on.
      padding: share of the padded elements of the array that orders the buckets.
      most: so many buckets at most: each is a compiled program.
      multiples: see `make_buckets`.
      batches: arguments of `PooledBatcher` (batch_size or frames, multiple).
    """
    found = []
    for count in (c for c in (1, 2, 3, 4, 6, 8, 12, 16) if c <= most):
        buckets = make_buckets([corpus], count, multiples)
        batcher = PooledBatcher(corpus, buckets, 0, **batches)
        found.append((batcher.padding(batcher.per_pass).fraction, buckets))
        if found[-1][0] <= padding or len(buckets) < count:
            break
    enough = max(padding, min(share for share, _ in found) + 0.01)
    return next(buckets for share, buckets in found if share <= enough)
