"""The shapes that examples are padded to: as few as the data needs, or a grid known beforehand."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedasr.data.batching.types import Bucket, Padding
from fedasr.data.corpus import Corpus, all_lengths
from fedasr.errors import UserError


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-int(value) // multiple) * multiple


def rounded_slots(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is at least `count`.

    Batches measured in frames differ in their number of examples: few sizes are few compilations.
    """
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def make_buckets(
    corpora: Sequence[Corpus], count: int = 1, multiples: Mapping[str, int] | None = None
) -> tuple[dict[str, int], ...]:
    """The bucket shapes with the least padding, were every example padded to the first that fits.

    Args:
      corpora: their examples must all fit in the last bucket.
      count: at most this many buckets.
      multiples: {ragged array: its padded lengths are multiples of this}, default 8. The first
        array named (default: the one with the longest example) orders the examples, and its
        padding is what counts.

    Returns:
      Buckets in ascending order; () where nothing is ragged.
    """
    lengths: dict[str, list[np.ndarray]] = {}
    for corpus in corpora:
        for name, values in all_lengths(corpus).items():
            lengths.setdefault(name, []).append(values)
    if not lengths:
        return ()
    joined = {name: np.concatenate(values) for name, values in lengths.items()}
    multiples = dict(multiples or {})
    unknown = set(multiples) - set(joined)
    if unknown:
        raise UserError(f"no ragged array {sorted(unknown)}: the corpus has {sorted(joined)}")
    lead = next(iter(multiples), max(joined, key=lambda name: int(joined[name].max())))
    units = -(-np.maximum(joined[lead], 1) // multiples.get(lead, 8))
    buckets: list[dict[str, int]] = []
    for boundary in best_boundaries(units, count):
        inside = units <= boundary
        bucket = {
            name: round_up(max(int(values[inside].max()), 1), multiples.get(name, 8))
            for name, values in joined.items()
        }
        if not buckets or bucket != buckets[-1]:
            buckets.append(bucket)
    return tuple(buckets)


def best_boundaries(lengths: np.ndarray, count: int) -> list[int]:
    """The boundaries that minimise the sum of all lengths, each rounded up to a boundary.

    Exact, by dynamic programming over the histogram; over 1,024 different lengths neighbours are
    taken together, so that a boundary may be too large by a thousandth of the range.

    Args:
      lengths: positive integers.
      count: at most so many boundaries.

    Returns:
      Ascending; the last one is the longest length's.
    """
    coarse = -(-int(lengths.max()) // 1024)
    values, counts = np.unique(-(-lengths // coarse), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # lengths below each value
    # cost[i, j]: of values i to j with the boundary j; best[j]: of values 0 to j so far.
    cost = np.where(
        np.arange(len(values))[:, None] <= np.arange(len(values)),
        values * (before[1:] - before[:-1, None]).astype(np.float64),
        np.inf,
    )
    best, choices = cost[0], []
    for _ in range(min(count, len(values)) - 1):
        table = np.concatenate([[0.0], best[:-1]])[:, None] + cost
        choices.append(table.argmin(axis=0))
        best = table.min(axis=0)
    boundaries, end = [], len(values) - 1
    for first in [*choices[::-1], np.zeros(len(values), np.int64)]:
        boundaries.append(int(values[end]) * coarse)
        end = int(first[end]) - 1
        if end < 0:
            break
    return boundaries[::-1]


def fitting_bucket(buckets: Sequence[Bucket], lengths: Mapping[str, int]) -> int:
    """Index of the first bucket that holds arrays of these lengths.

    Raises:
      UserError: when none does.
    """
    for index, bucket in enumerate(buckets):
        if all(lengths[name] <= size for name, size in bucket.items()):
            return index
    raise UserError(f"an example of lengths {dict(lengths)} fits in none of the buckets {buckets}")


def fitting_buckets(
    buckets: Sequence[Bucket], lengths: Mapping[str, np.ndarray], examples: int
) -> np.ndarray:
    """`fitting_bucket` of every example: int64 [examples]."""
    if not buckets or not lengths:
        return np.zeros(examples, np.int64)
    fitting = np.full(examples, -1)
    for index in reversed(range(len(buckets))):
        inside = [lengths[name] <= size for name, size in buckets[index].items()]
        fitting[np.all(inside, axis=0)] = index
    if (fitting < 0).any():  # the first such example is named by the error
        row = int(np.argmin(fitting))
        fitting_bucket(buckets, {name: int(values[row]) for name, values in lengths.items()})
    return fitting


def fewest_buckets(
    corpora: Sequence[Corpus],
    padding: float,
    most: int,
    multiples: Mapping[str, int] | None = None,
) -> tuple[dict[str, int], ...]:
    """As few buckets as keep padding below a share, were every example padded to the first.

    Args:
      corpora, multiples: see `make_buckets`.
      padding: share of the padded elements of the array that orders the buckets.
      most: so many buckets at most, even if they pad more: each is a compiled program.
    """
    for count in range(1, most + 1):
        buckets = make_buckets(corpora, count, multiples)
        if len(buckets) < count or bucket_padding(corpora, buckets).fraction <= padding:
            break
    return buckets


def bucket_padding(corpora: Sequence[Corpus], buckets: Sequence[Bucket]) -> Padding:
    """Padding of the array that the buckets name first, were every example padded to the first."""
    total, unit = Padding(0, 0), next(iter(buckets[0]), None) if buckets else None
    for corpus in corpora:
        lengths = all_lengths(corpus)
        if unit not in lengths:
            continue
        fitting = fitting_buckets(buckets, lengths, len(lengths[unit]))
        sizes = np.array([bucket[unit] for bucket in buckets])
        total += Padding(int(lengths[unit].sum()), int(sizes[fitting].sum()))
    return total


@dataclass(frozen=True)
class Grid:
    """Padded lengths that are known before any data is: so many to each doubling.

    A user whose arrays are rounded up on it is computed in a shape that depends on the user's own
    data alone. A shape that followed from everybody's lengths would let one user change how the
    updates of all others are rounded, which no clipping bounds.

    per_doubling: lengths between one and its double.
    multiples: {ragged array: its padded lengths are multiples of this}, default 8. The first array
      named (default: the corpus's first) has the lengths of the grid, in frames, from one multiple
      on.
    room: {another ragged array: its padded length for each frame}, default 1. An example with more
      is padded as a longer one.
    """

    per_doubling: int = 2
    multiples: Mapping[str, int] | None = None
    room: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.per_doubling < 1:
            raise UserError(f"a grid needs at least 1 length to a doubling: {self.per_doubling}")
        if bad := [name for name, room in (self.room or {}).items() if not room > 0]:
            raise UserError(f"the grid has no room for {bad[0]!r}: give it more than 0 a frame")

    def cells(self, lengths: Mapping[str, np.ndarray]) -> tuple[dict[str, int], ...]:
        """The padded lengths in ascending order, until one that ends a doubling holds everything.

        Of two corpora one has the cells of the other, and perhaps more.

        Args:
          lengths: of all examples, by ragged array; () where there are none.

        Raises:
          UserError: `multiples` name an array that is not there.
        """
        if not lengths:
            return ()
        multiples = dict(self.multiples or {})
        if unknown := set(multiples) - set(lengths):
            raise UserError(f"no ragged array {sorted(unknown)}: the corpus has {sorted(lengths)}")
        lead = next(iter(multiples or lengths))
        multiple, room = multiples.get(lead, 8), dict(self.room or {}) | {lead: 1.0}
        longest = {name: int(values.max()) for name, values in lengths.items()}
        cells: list[dict[str, int]] = []
        for step in itertools.count():
            exact = multiple * 2 ** (step / self.per_doubling)
            frames = round_up(math.ceil(exact - 1e-9), multiple)
            cell = {
                name: round_up(math.ceil(frames * room.get(name, 1.0)), multiples.get(name, 8))
                for name in lengths
            }
            cell = {lead: frames} | cell  # in this order: the first counts
            if not cells or cell[lead] != cells[-1][lead]:
                cells.append(cell)
            done = all(cell[name] >= size for name, size in longest.items())
            if done and step % self.per_doubling == 0:
                break
        return tuple(cells)

    def tops(self, cells: Sequence[Bucket]) -> list[int]:
        """The cells that end a doubling."""
        first = [next(iter(cell.values())) for cell in cells]
        return [i for i, size in enumerate(first) if (size // first[0]).bit_count() == 1]
