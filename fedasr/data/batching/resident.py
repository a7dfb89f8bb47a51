"""A corpus that stays on the devices."""

import math
from collections.abc import Sequence

import numpy as np

from fedasr.data.batching import arrays as memory
from fedasr.data.batching.types import Bucket, Resident
from fedasr.data.corpus import Corpus, all_lengths
from fedasr.errors import UserError


def make_resident(
    corpus: Corpus, buckets: Sequence[Bucket], select: Sequence[str] | None = None
) -> Resident:
    """Reads all examples of a corpus.

    Args:
      corpus, buckets, keep: as in `ClientBatcher`.

    Raises:
      UserError: an array would be larger than `arrays.MAX_ARRAY_BYTES`, or have 2^31 rows.
    """
    sizes, lengths = np.asarray(corpus.sizes, np.int64), all_lengths(corpus)
    ragged = next(iter(buckets), {})
    user_ends = np.cumsum(sizes)
    examples = int(user_ends[-1])
    arrays: dict[str, np.ndarray] = {}
    ends: dict[str, np.ndarray] = {}
    for user, (end, size) in enumerate(zip(user_ends.tolist(), sizes.tolist(), strict=True)):
        read = corpus.get(user, range(size))
        for name in [n for n in read[0] if select is None or n in select]:
            rows = [np.asarray(x[name]) for x in read]
            if name not in arrays:
                if name in ragged:  # or known to be of one length
                    own = lengths.get(name, np.full(examples, len(rows[0])))
                    ends[name] = np.cumsum(own, dtype=np.int64)
                count = int(ends[name][-1]) if name in ragged else examples
                arrays[name] = _array(name, count, rows[0].shape[name in ragged :], rows[0].dtype)
            if name in ragged:
                last = int(ends[name][end - 1])
                first = last - sum(map(len, rows))
                np.concatenate(rows, out=arrays[name][first:last])
            else:
                arrays[name][end - size : end] = rows
    offsets = {name: np.append(0, end[:-1]).astype(np.int32) for name, end in ends.items()}
    sizes_of = {name: np.diff(end, prepend=0).astype(np.int32) for name, end in ends.items()}
    return Resident(arrays, offsets, sizes_of)


def _array(name: str, count: int, tail: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Room for so many rows."""
    if count > np.iinfo(np.int32).max:
        raise UserError(f"{name!r} has {count} rows: too many for a resident corpus")
    size = math.prod((count, *tail)) * dtype.itemsize
    if size > memory.MAX_ARRAY_BYTES:
        raise UserError(
            f"{name!r} of all users would take {size / 2**30:.0f} GiB on every "
            "device: a corpus of this size cannot be resident"
        )
    return memory.unfilled(name, (max(count, 1), *tail), dtype)
