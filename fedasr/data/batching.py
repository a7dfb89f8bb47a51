"""From users to device-ready chunks: local batches, length buckets, padding, prefetch.

Everything here is a pure function of (seed, round, user), so that a resumed run sees the same data.
A user's arrays are padded along axis 0 to the shape of a *bucket*; one bucket and one number of
steps make one compiled program.
"""

import copy
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedasr.data.corpus import Corpus, Example, all_lengths
from fedasr.errors import UserError
from fedasr.streams import Stream, generator

Bucket = Mapping[str, int]  # the padded length of axis 0 of every ragged array
# Of one array of a chunk; beyond this a machine would be out of memory.
MAX_ARRAY_BYTES = 16 << 30
# Of one device's clients that are trained in turns: enough for calls to cost little.
TURN_BYTES = 16 << 20
# Doublings below a user's longest example for which parts of batches have shapes of their own.
_PART_DOUBLINGS = 3.5
_ALIGNMENT = 64


class Store(NamedTuple):
    """A client's examples, each once, and which of them make each batch (no client axis here).

    `fedasr.federated.client.take_batch` gathers a batch on the device. However many epochs a client
    makes, and however its examples differ in length, it needs little more memory than its data.

    A batch may be computed in several parts, each padded to a shape of its own.

    index: int32 [steps, parts, slots], an example's number; -1 for padding, which comes last.
    arrays: {name: [frames, ...] for a ragged array, its examples laid end to end; [examples, ...]
      for others}.
    offsets, lengths: {ragged name: int32 [examples]}, where an example begins in `arrays` and ends.
    spans: for each of the shapes {ragged name: bool [padded length]} and {"": bool [slots]}; only
      the shapes of these arrays are meant.
    kinds: int32 [steps, parts], which of the shapes holds the part. parts: int32 [steps], how many
      there are.
    """

    index: Any
    arrays: Mapping[str, Any]
    offsets: Mapping[str, Any]
    lengths: Mapping[str, Any]
    spans: Sequence[Mapping[str, Any]]
    kinds: Any
    parts: Any


class Resident(NamedTuple):
    """All examples of a corpus, for chunks that only say which of them make each batch.

    arrays, offsets, lengths: as in a `Store`, of all users, in their order.
    """

    arrays: Mapping[str, Any]
    offsets: Mapping[str, Any]
    lengths: Mapping[str, Any]


class Chunk(NamedTuple):
    """Clients that are trained side by side, or in turns; the leading axis is the client.

    batches: {name: [clients, steps, batch, ...]}, with "<name>_length" int32
      [clients, steps, batch] for every ragged array, and "mask" bool, False for padding; or a
      `Store` whose arrays have a leading client axis.
    num_steps: int32 [clients], how many of the steps are real; 0 for an empty slot.
    user: int32 [clients], the user's index in the corpus. weight: float32 [clients], 1, the user's
      number of examples, or a weight of the user's own; 0 if empty.
    local: None, or float32 [clients, n], the users' local parameters (see
      `fedasr.federated.local`); the batcher leaves them to the simulation.
    resident: None, or the arrays that the `Store` in `batches` then leaves out, without a client
      axis; the simulation adds them.
    """

    batches: Mapping[str, Any] | Store
    num_steps: Any
    user: Any
    weight: Any
    local: Any = None
    resident: Resident | None = None


class Padding(NamedTuple):
    """How much of the work was real: `real` and `computed` count elements of axis 0 (frames)."""

    real: int
    computed: int

    @property
    def fraction(self) -> float:
        """Share of the computed elements that is padding."""
        return 1.0 - self.real / self.computed if self.computed else 0.0

    def __add__(self, other: "Padding") -> "Padding":  # type: ignore[override]
        return Padding(self.real + other.real, self.computed + other.computed)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-int(value) // multiple) * multiple


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


def _fitting_buckets(
    buckets: Sequence[Bucket], lengths: Mapping[str, np.ndarray], examples: int
) -> np.ndarray:
    """`fitting_bucket` of every example: int64 [examples]."""
    if not buckets or not lengths:
        return np.zeros(examples, np.int64)
    fitting = np.full(examples, -1)
    for index in reversed(range(len(buckets))):
        inside = [lengths[name] <= size for name, size in buckets[index].items()]
        fitting[np.logical_and.reduce(inside)] = index
    if (fitting < 0).any():  # the first such example is named by the error
        row = int(np.argmin(fitting))
        fitting_bucket(buckets, {name: int(values[row]) for name, values in lengths.items()})
    return fitting


def pack(lengths: np.ndarray, frames: int) -> list[np.ndarray]:
    """Cuts a sequence of examples into batches of about `frames` frames each.

    Laid end to end, the examples that begin within one window of `frames` make a batch, which so
    exceeds the window by less than one example.

    Args:
      lengths: frames of each example, in order.
      frames: of a window.

    Returns:
      Positions in `lengths`, batch by batch, none empty.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    window = (ends - lengths) // frames
    return np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(window)) + 1)


def rounded_slots(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is at least `count`.

    Batches measured in frames differ in their number of examples: few sizes are few compilations.
    """
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


@dataclass(frozen=True)
class LocalBatches:
    """How a client cuts its examples into batches in one round.

    Set one of batch_size and frames, and one of steps and epochs.

    batch_size: examples per batch.
    steps: so many batches, from as many passes over shuffled data as that takes; batches are full
      unless the user has fewer examples than that.
    epochs: so many passes; each pass ends with a smaller batch where the size does not divide.
    max_steps: with epochs, a limit to the number of batches.
    frames: a batch holds about so many frames (see `pack`), counted in the corpus's lengths of the
      array that the buckets name first: batches measured in seconds of audio. The last batch of a
      pass holds the rest.
    """

    batch_size: int | None = None
    steps: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("set exactly one of the client's steps and epochs")
        if (self.batch_size is None) == (self.frames is None):
            raise UserError("set exactly one of the client's batch size and batch frames")
        counts = (self.batch_size, self.steps, self.epochs, self.max_steps, self.frames)
        if any(count is not None and count < 1 for count in counts):
            raise UserError("the client's batch size, steps and epochs must be at least 1")

    def plan(
        self, size: int, seed: int, round: int, user: int, lengths: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Indices of the examples in each batch: a pure function of the arguments.

        Args:
          size: number of examples of the user.
          seed, round, user: name the shuffle.
          lengths: frames of the examples, for batches measured in frames.
        """
        rng = generator(Stream.EXAMPLES, seed, round, user)
        if self.frames is not None:
            batches: list[np.ndarray] = []
            for _ in range(self.epochs or self.steps or 0):
                order = rng.permutation(size)
                batches += [order[part] for part in pack(lengths[order], self.frames)]
                if self.steps is not None and len(batches) >= self.steps:
                    break
            return batches[: self.steps or self.max_steps]
        if self.steps is not None:
            batch = min(self.batch_size, size)
            passes = -(-self.steps * batch // size)
            stream = np.concatenate([rng.permutation(size) for _ in range(passes)])
            return list(stream[: self.steps * batch].reshape(self.steps, batch))
        batches = []
        for _ in range(self.epochs or 0):
            order = rng.permutation(size)
            batches += [order[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        return batches[: self.max_steps]


class Shape(NamedTuple):
    """What a part of a batch is padded to: so many examples, and a bucket by its place."""

    slots: int
    bucket: int


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
                return tuple(cells)

    def tops(self, cells: Sequence[Bucket]) -> list[int]:
        """The cells that end a doubling."""
        first = [next(iter(cell.values())) for cell in cells]
        return [i for i, size in enumerate(first) if (size // first[0]).bit_count() == 1]


def part_shapes(top: int, slots: int, per_doubling: int) -> tuple[Shape, ...]:
    """Shapes for the parts of a user's batches, from the user's longest example downwards.

    One for any single example, the others for `slots` examples of a cell.

    Args:
      top: the cell that holds the user's examples.
      slots: at most so many examples are computed together.
      per_doubling: of the grid.
    """
    cells = range(top, max(-1, top - math.ceil(_PART_DOUBLINGS * per_doubling)), -1)
    return tuple(dict.fromkeys([Shape(1, top), *(Shape(slots, cell) for cell in cells)]))


def _cheapest(
    needs: np.ndarray, shapes: Sequence[Shape], costs: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Batches divided into parts at the lowest cost, by dynamic programming.

    Args:
      needs: int [batches, n], the bucket of each example, in ascending order.
      shapes: one of them must hold an example of any bucket. costs: of each.

    Returns:
      float64 and int [batches, n + 1]: what the first k examples cost, and the shape of the part
      that holds the last of them, with as many before it as there is room for.
    """
    least = np.zeros((len(needs), needs.shape[1] + 1))
    kinds = np.zeros(least.shape, np.int64)
    limits = np.array([shape.bucket for shape in shapes])
    for count in range(1, least.shape[1]):
        before = np.stack(
            [
                least[:, max(count - shape.slots, 0)] + cost
                for shape, cost in zip(shapes, costs, strict=True)
            ],
            axis=1,
        )
        before[limits < needs[:, count - 1, None]] = np.inf
        kinds[:, count] = before.argmin(axis=1)
        least[:, count] = before.min(axis=1)
    return least, kinds


class _Layout(NamedTuple):
    """All that the arrays of a client's batches are shaped by: of the client's own data alone.

    shapes: that its batches, or their parts, are computed in. level: `ClientBatcher._room` for its
    examples. parts: room for those of a batch.
    """

    shapes: tuple[Shape, ...]
    level: int
    parts: int


class _Client(NamedTuple):
    """plan: indices of the examples of each batch. real: their elements, of axis 0, in all.

    parts: of each batch, the shape and the number of examples of each of its parts.
    wanted, where: the examples of the plan, each once, and for all its indices which of these.
    lengths: of `wanted`, by ragged array.
    """

    user: int
    layout: _Layout
    plan: list[np.ndarray]
    parts: list[list[tuple[int, int]]]
    real: int
    wanted: np.ndarray
    where: np.ndarray
    lengths: dict[str, np.ndarray]


def make_resident(
    corpus: Corpus, buckets: Sequence[Bucket], keep: Sequence[str] | None = None
) -> Resident:
    """Reads all examples of a corpus.

    Args:
      corpus, buckets, keep: as in `ClientBatcher`.

    Raises:
      UserError: an array would be larger than `MAX_ARRAY_BYTES`, or have 2^31 rows.
    """
    sizes, lengths = np.asarray(corpus.sizes, np.int64), all_lengths(corpus)
    ragged = next(iter(buckets), {})
    user_ends = np.cumsum(sizes)
    examples = int(user_ends[-1])
    arrays: dict[str, np.ndarray] = {}
    ends: dict[str, np.ndarray] = {}
    for user, (end, size) in enumerate(zip(user_ends.tolist(), sizes.tolist(), strict=True)):
        read = corpus.get(user, range(size))
        for name in [n for n in read[0] if keep is None or n in keep]:
            rows = [np.asarray(x[name]) for x in read]
            if name not in arrays:
                if name in ragged:  # or known to be of one length
                    own = lengths.get(name, np.full(examples, len(rows[0])))
                    ends[name] = np.cumsum(own, dtype=np.int64)
                count = int(ends[name][-1]) if name in ragged else examples
                if count > np.iinfo(np.int32).max:
                    raise UserError(f"{name!r} has {count} rows: too many for a resident corpus")
                tail = rows[0].shape[name in ragged :]
                size_of = math.prod((count, *tail)) * rows[0].dtype.itemsize
                if size_of > MAX_ARRAY_BYTES:
                    raise UserError(
                        f"{name!r} of all users would take {size_of / 2**30:.0f} GiB on every "
                        "device: a corpus of this size cannot be resident"
                    )
                arrays[name] = _room(name, (max(count, 1), *tail), rows[0].dtype)
            if name in ragged:
                last = int(ends[name][end - 1])
                first = last - sum(map(len, rows))
                np.concatenate(rows, out=arrays[name][first:last])
            else:
                arrays[name][end - size : end] = rows
    offsets = {name: np.append(0, end[:-1]).astype(np.int32) for name, end in ends.items()}
    sizes_of = {name: np.diff(end, prepend=0).astype(np.int32) for name, end in ends.items()}
    return Resident(arrays, offsets, sizes_of)


class ClientBatcher:
    """Turns a cohort into chunks of clients of one shape, those with the most work first.

    In which shapes a client is computed follows from its own data and from the arguments, but for
    `corpus` and `resident`: other users' data may not change how a client's update is rounded.

    Args:
      corpus: where the examples are.
      local: how a client's examples become batches.
      buckets: a `Grid`, or padded lengths in ascending order, of which each client has the first
        that hold its examples. Where the sum is to be private, they must not come from users' data
        (as those of `make_buckets` do).
      chunk_size: clients per chunk over all devices.
      seed: of the order of examples.
      keep: names of the arrays that the loss needs; default all.
      devices: among which a chunk is divided; each computes the steps of its own longest client.
      weights: of the users, [users], such as their numbers of examples; None for 1.
      rows: of a chunk that this process needs, counted without turns; the others are not read (but
        for an example of the first, for its sizes) and not in the chunks. None for all.
      micro_batch: above 0, batches are computed in parts of at most so many examples of like
        length, in the shapes of `part_shapes` on the grid; 0 for whole batches. Clients vmapped
        together would wait for the longest of their parts: one a device.
      resident: of this corpus, from `make_resident`: chunks hold indices only, whatever `rows` are.
      turns: with one client on a device, make one chunk of so many: each device trains its clients
        of all of them one after another, and its rows are side by side. Fewer where the room for
        their data would exceed `TURN_BYTES`.

    Raises:
      UserError: for arguments that make no sense together.
    """

    def __init__(
        self,
        corpus: Corpus,
        local: LocalBatches,
        buckets: Sequence[Bucket] | Grid,
        chunk_size: int,
        seed: int,
        keep: Sequence[str] | None = None,
        devices: int = 1,
        weights: np.ndarray | None = None,
        rows: slice | None = None,
        micro_batch: int = 0,
        turns: int = 1,
        resident: Resident | None = None,
    ) -> None:
        if chunk_size < 1:
            raise UserError(f"chunk must be at least 1 (got {chunk_size})")
        if turns > 1 and chunk_size != devices:
            raise UserError("turns need one client on a device")
        if micro_batch and chunk_size != devices:
            raise UserError("batches in parts (micro_batch) need chunk=1: one client on a device")
        grid = buckets if isinstance(buckets, Grid) else None
        self._corpus, self._local = corpus, local
        self._buckets = tuple(buckets) if grid is None else grid.cells(all_lengths(corpus))
        self._chunk_size, self._seed, self._keep = chunk_size, seed, keep
        self._devices, self._weights = devices, weights
        self._rows = range(chunk_size) if rows is None else range(chunk_size)[rows]
        self._unit = next(iter(self._buckets[0]), None) if self._buckets else None
        if local.frames is not None and self._unit is None:
            raise UserError("batches measured in frames need examples whose lengths vary")
        # A fixed number of batches of a fixed size is as small dense, and one shape for everybody.
        self._resident = resident
        self._stored = (
            resident is not None
            or micro_batch > 0
            or local.steps is None
            or local.frames is not None
        )
        self._frames = [next(iter(bucket.values()), 1) for bucket in self._buckets] or [1]
        self._part_shapes: dict[int, tuple[Shape, ...]] = {}
        if micro_batch:
            if grid is None or not self._buckets:
                raise UserError(
                    "batches in parts (micro_batch) need a Grid, and examples whose lengths vary"
                )
            self._part_shapes = {
                top: part_shapes(top, micro_batch, grid.per_doubling)
                for top in grid.tops(self._buckets)
            }
        if resident is not None:
            sizes = np.asarray(corpus.sizes, np.int64)
            whole = {**resident.arrays, **resident.offsets}
            if any(len(x) != sizes.sum() for x in whole.values()):
                raise UserError("the resident examples are those of another corpus")
            self._before = np.cumsum(sizes) - sizes  # examples of users before each
        self._most_turns = turns
        self._varying = frozenset(corpus.lengths(0))
        self._sample: dict[str, np.ndarray] | None = None  # see `_template`

    def _client(self, user: int, round: int, seed: int) -> _Client:
        lengths = self._corpus.lengths(user)
        size = int(self._corpus.sizes[user])
        unit = None if self._local.frames is None else np.asarray(lengths[self._unit])
        plan = self._local.plan(size, seed, round, user, unit)
        needs = _fitting_buckets(self._buckets, lengths, size)
        largest = int(needs[np.concatenate(plan)].max())
        if self._part_shapes:
            plan = [batch[np.argsort(-needs[batch], kind="stable")] for batch in plan]
            shapes = self._part_shapes[min(top for top in self._part_shapes if top >= largest)]
            parts = [self._parts(needs[batch], shapes) for batch in plan]
        else:
            shapes = (Shape(self._slots(plan), largest),)
            parts = [[(0, len(batch))] for batch in plan]
        order = np.concatenate(plan)
        seen = np.zeros(size, bool)
        seen[order] = True
        wanted, where = np.flatnonzero(seen), (np.cumsum(seen) - 1)[order]
        of_wanted = {name: np.asarray(values)[wanted] for name, values in lengths.items()}
        if self._unit is None:
            real = len(where)
        elif self._unit in of_wanted:
            real = int(of_wanted[self._unit][where].sum())
        else:  # an array that the corpus knows to be of one length
            real = len(where) * len(self._corpus.get(user, [int(wanted[0])])[0][self._unit])
        layout = _Layout(shapes, 0, 1)
        if self._stored:
            need = {"steps": len(plan)}
            if self._resident is None:
                need["examples"] = len(wanted)
                need |= {f"/{name}": int(values.sum()) for name, values in of_wanted.items()}
            layout = self._roomy(shapes, need, max(map(len, parts)))
        return _Client(user, layout, plan, parts, real, wanted, where, of_wanted)

    def _parts(self, needs: np.ndarray, shapes: Sequence[Shape]) -> list[tuple[int, int]]:
        """The shape and the number of examples of each part of a batch (`needs`: descending)."""
        # A little more for a part than for its frames, so that of equals the fewest are taken.
        costs = [1 + shape.slots * self._frames[shape.bucket] for shape in shapes]
        _, kinds = _cheapest(needs[None, ::-1], shapes, costs)
        parts, left = [], len(needs)
        while left:
            size = min(shapes[kinds[0, left]].slots, left)
            parts.append((int(kinds[0, left]), size))
            left -= size
        return parts

    def _roomy(self, shapes: tuple[Shape, ...], need: Mapping[str, int], parts: int) -> _Layout:
        """The smallest layout with room for so much."""
        room = 1
        if self._part_shapes:
            longest = self._frames[shapes[0].bucket]
            room = self._local.batch_size or -(-2 * self._local.frames // longest)
        while room < parts:
            room *= 2
        layout = _Layout(shapes, 0, room)
        while any(size > self._room(layout).get(name, size) for name, size in need.items()):
            layout = layout._replace(level=layout.level + 1)
        return layout

    def _room(self, layout: _Layout) -> dict[str, int]:
        """What a `Store` has room for: "steps", "examples" and, of each ragged array, "/name".

        All together by powers of 4: sizes rounded one by one would be many more shapes to compile.
        What is too large costs memory and transfer, but no computation: the loop's bound is a
        traced value.
        """
        local, examples = self._local, 4**layout.level
        bucket = self._buckets[layout.shapes[0].bucket] if self._buckets else {}
        # An example is about half as long as the longest.
        room = {f"/{name}": examples * -(-size // 2) for name, size in bucket.items()}
        passes = examples
        if local.batch_size is not None:
            passes = -(-examples // local.batch_size)
        elif self._unit is not None:
            passes = min(examples, -(-room[f"/{self._unit}"] // local.frames))
        steps = local.steps or min((local.epochs or 1) * passes, local.max_steps or math.inf)
        return room | {"examples": examples, "steps": int(steps)}

    def chunks(
        self, users: Iterable[int], round: int, seed: int | None = None
    ) -> Iterator[tuple[Chunk, Padding]]:
        """Reads and pads the data of a round's cohort, chunk by chunk (numpy arrays)."""
        seed = self._seed if seed is None else seed
        clients = [self._client(int(user), round, seed) for user in users]
        clients.sort(key=self._place)
        for layout, alike in itertools.groupby(clients, lambda client: client.layout):
            group = list(alike)
            side_by_side = [
                group[start : start + self._chunk_size]
                for start in range(0, len(group), self._chunk_size)
            ]
            # The devices do not wait for each other between chunks: each has the most work in its
            # turn.
            side_by_side[1::2] = [together[::-1] for together in side_by_side[1::2]]
            turns = self._turns(layout, group[0])
            for start in range(0, len(side_by_side), turns):
                yield self._build(side_by_side[start : start + turns], turns)

    def _place(self, client: _Client) -> tuple:
        """Where a client comes in a round: clients of one layout together, then by their work."""
        (slots, bucket), level, parts = client.layout.shapes[0], *client.layout[1:]
        # Devices side by side have like work where batches are in parts.
        work = client.real if self._part_shapes else len(client.plan)
        return -bucket, -slots, -level, -parts, -work, client.user

    def _turns(self, layout: _Layout, client: _Client) -> int:
        """Clients of a layout that a device trains in a call."""
        if self._most_turns == 1 or self._resident is not None:
            return self._most_turns
        most = TURN_BYTES // self._bytes(layout, self._template(client))
        return int(np.clip(most, 1, self._most_turns))

    def _bytes(self, layout: _Layout, example: Example) -> int:
        """What chunks hold of each client of a layout, indices aside; `example`: of any user."""
        bucket = self._buckets[layout.shapes[0].bucket] if self._buckets else {}
        room, total = self._room(layout), 0
        for name, value in example.items():
            size = value.dtype.itemsize * math.prod(value.shape[name in bucket :])
            if self._stored and name in self._varying:
                total += size * room[f"/{name}"]
            elif self._stored:
                total += size * room["examples"] * (len(value) if name in bucket else 1)
            else:
                total += size * self._local.steps * layout.shapes[0].slots * bucket.get(name, 1)
        return max(total, 1)

    def _slots(self, plan: Sequence[np.ndarray]) -> int:
        """Examples that a batch of a client must have room for."""
        return self._local.batch_size or rounded_slots(max(map(len, plan)))

    def _build(self, turns: list[list[_Client]], most: int) -> tuple[Chunk, Padding]:
        """A chunk of clients of one layout, side by side, or in `turns` of at most so many."""
        clients = [client for turn in turns for client in turn]
        layout = clients[0].layout
        shapes = layout.shapes
        per_device = self._chunk_size // self._devices
        rows = [  # those of a device are side by side
            (i // per_device * most + turn) * per_device + i % per_device
            for turn, own in enumerate(turns)
            for i in range(len(own))
        ]
        slots = self._chunk_size * most
        num_steps = np.zeros(slots, np.int32)
        num_steps[rows] = [len(c.plan) for c in clients]
        user = np.zeros(slots, np.int32)
        user[rows] = [c.user for c in clients]
        weight = (num_steps > 0).astype(np.float32)
        if self._weights is not None:
            weight[rows] = [self._weights[c.user] for c in clients]
        own = slice(self._rows.start * most, self._rows.stop * most)
        held = [
            (row - own.start, client)
            for row, client in zip(rows, clients, strict=True)
            if own.start <= row < own.stop
        ]
        if self._stored:
            batches: Any = self._store(clients, held, len(self._rows) * most)
        else:
            (shape,) = shapes
            bucket = self._buckets[shape.bucket] if self._buckets else {}
            size = (len(self._rows) * most, self._local.steps, shape.slots)
            batches = self._dense(clients, held, bucket, size)
        frames = [shape.slots * self._frames[shape.bucket] for shape in shapes]
        if not self._part_shapes:
            longest = num_steps.reshape(-1, per_device).max(axis=1)
            computed = int(longest.sum()) * per_device * frames[0]
        else:
            computed = sum(frames[kind] for c in clients for step in c.parts for kind, _ in step)
        chunk = Chunk(batches, num_steps[own], user[own], weight[own])
        return chunk, Padding(sum(c.real for c in clients), computed)

    def example_chunk(self, users: Iterable[int], round: int) -> Chunk | None:
        """The first chunk of a round with the data of one row, or of one device's turns, alone.

        None of an empty cohort.
        """
        one = copy.copy(self)
        one._rows = range(1)
        return next((chunk for chunk, _ in one.chunks(users, round)), None)

    def _template(self, client: _Client) -> dict[str, np.ndarray]:
        """An example's names and dtypes, and its sizes without those that vary."""
        if self._sample is None:
            example = self._kept(self._corpus.get(client.user, [int(client.wanted[0])])[0])
            self._sample = {n: x[:0] if n in self._varying else x for n, x in example.items()}
        return self._sample

    def _kept(self, example: Example) -> dict[str, np.ndarray]:
        """The arrays that the loss needs."""
        names = [n for n in example if self._keep is None or n in self._keep]
        return {name: np.asarray(example[name]) for name in names}

    def _dense(
        self,
        clients: list[_Client],
        held: list[tuple[int, _Client]],
        bucket: Bucket,
        shape: tuple[int, int, int],
    ) -> dict[str, np.ndarray]:
        """Every batch of the clients whose data this process needs, at their rows, padded."""
        batches: dict[str, np.ndarray] = {}
        mask = np.zeros(shape, np.bool_)
        if not held:
            place(batches, (0, 0, 0), shape, self._template(clients[0]), bucket, fill=False)
        for position, client in held:
            examples = self._corpus.get(client.user, client.wanted.tolist())
            if not batches:
                first = self._kept(examples[0])
                place(batches, (0, 0, 0), shape, first, bucket, fill=False)
            per_batch = len(client.plan[0])  # the same in all of the plan's
            mask[position, :, :per_batch] = True
            picked = client.where.tolist()
            places = list(itertools.product(range(shape[1]), range(per_batch)))
            for name in first:
                own, room = batches[name][position], bucket.get(name)
                values = [examples[i][name] for i in picked]
                if room is None:
                    for at, value in zip(places, values, strict=True):
                        own[at] = value
                    continue
                lengths = [len(value) for value in values]
                for at, value, length in zip(places, values, lengths, strict=True):
                    own[at][:length] = value
                    if length < room:
                        own[at][length:] = 0
                batches[f"{name}_length"][position, :, :per_batch] = np.reshape(
                    lengths, (-1, per_batch)
                )
        batches["mask"] = mask
        if not mask.all():
            for values in batches.values():
                values[~mask] = 0
        return batches

    def _store(self, clients: list[_Client], held: list[tuple[int, _Client]], rows: int) -> Store:
        """Every example of the clients whose data this process needs once, at their rows."""
        layout = clients[0].layout
        shapes, sizes = layout.shapes, self._room(layout)
        buckets = [self._buckets[shape.bucket] if self._buckets else {} for shape in shapes]
        read: dict[int, list[Example]] = {}
        if self._resident is None:
            read = {
                position: self._corpus.get(client.user, client.wanted.tolist())
                for position, client in held
            }
            first = next(iter(read.values()))[0] if read else self._template(clients[0])
            first = self._kept(first)
            ragged = [name for name in first if name in buckets[0]]
        else:
            first, ragged = {}, list(self._resident.offsets)
        parts = np.zeros((rows, sizes["steps"]), np.int32)
        kinds = np.zeros((*parts.shape, layout.parts), np.int32)
        index = np.full((*kinds.shape, max(shape.slots for shape in shapes)), -1, np.int32)
        for position, client in held:
            begin = 0
            number = client.where
            if self._resident is not None:
                number = self._before[client.user] + client.wanted[client.where]
            for step, own in enumerate(client.parts):
                parts[position, step] = len(own)
                for part, (kind, size) in enumerate(own):
                    kinds[position, step, part] = kind
                    index[position, step, part, :size] = number[begin : begin + size]
                    begin += size
        spans = [
            {"": np.zeros((rows, shape.slots), np.bool_)}
            | {name: np.zeros((rows, bucket[name]), np.bool_) for name in ragged}
            for shape, bucket in zip(shapes, buckets, strict=True)
        ]
        arrays, offsets, lengths = {}, {}, {}
        room = sizes["examples"]
        for name, value in first.items():
            if name not in ragged:
                arrays[name] = _zeros(name, (rows, room, *value.shape), value.dtype)
                for position, examples in read.items():
                    arrays[name][position, : len(examples)] = [x[name] for x in examples]
                continue
            frames = sizes[f"/{name}"] if name in self._varying else room * len(value)
            arrays[name] = _room(name, (rows, frames, *value.shape[1:]), value.dtype)
            arrays[name][[row for row in range(rows) if row not in read]] = 0
            offsets[name] = np.zeros((rows, room), np.int32)
            lengths[name] = np.zeros((rows, room), np.int32)
            for position, examples in read.items():
                values = [x[name] for x in examples]
                size = np.array([len(value) for value in values])
                ends = np.cumsum(size)
                np.concatenate(values, out=arrays[name][position, : ends[-1]])
                arrays[name][position, ends[-1] :] = 0
                offsets[name][position, : len(size)] = ends - size
                lengths[name][position, : len(size)] = size
        return Store(index, arrays, offsets, lengths, spans, kinds, parts)


def _zeros(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    zeros = _room(name, shape, dtype)
    zeros.fill(0)
    return zeros


def _room(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that holds anything."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > MAX_ARRAY_BYTES:
        raise UserError(
            f"{name!r} would take {size / 2**30:.0f} GiB for clients that are trained together: "
            "limit the steps of users with much data (client.max_steps), or take a smaller chunk"
        )
    # What begins at such an address JAX takes as it is for a CPU; other arrays, and other devices'
    # parts that don't, it copies.
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def place(
    batches: dict[str, np.ndarray],
    position: tuple[int, ...],
    shape: tuple[int, ...],
    example: Example,
    bucket: Bucket,
    keep: Sequence[str] | None = None,
    fill: bool = True,
) -> None:
    """Writes one example into zero-padded arrays of leading `shape`, making them when missing.

    Without `fill`, arrays that are made hold anything where no example is written.

    Raises:
      UserError: an array would be larger than `MAX_ARRAY_BYTES`.
    """
    for name, value in example.items():
        if keep is not None and name not in keep:
            continue
        value = np.asarray(value)
        tail = (bucket[name], *value.shape[1:]) if name in bucket else value.shape
        if name not in batches:
            make = _zeros if fill else _room
            batches[name] = make(name, (*shape, *tail), value.dtype)
        if name in bucket:
            lengths = batches.setdefault(f"{name}_length", np.zeros(shape, np.int32))
            lengths[position] = len(value)
            batches[name][(*position, slice(len(value)))] = value
            batches[name][(*position, slice(len(value), None))] = 0
        else:
            batches[name][position] = value
    batches.setdefault("mask", np.zeros(shape, np.bool_))[position] = True


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
        fitting = _fitting_buckets(buckets, lengths, len(lengths[unit]))
        sizes = np.array([bucket[unit] for bucket in buckets])
        total += Padding(int(lengths[unit].sum()), int(sizes[fitting].sum()))
    return total


def eval_batches(
    corpus: Corpus,
    buckets: Sequence[Bucket],
    batch_size: int | Sequence[int],
    keep: Sequence[str] | None = None,
    owners: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example of a corpus once, each bucket's in batches of equal shape (see "mask").

    `batch_size` may be one for each bucket: long examples, few of them together.

    With `owners` also "user", int32 [batch]: whose example it is, -1 for padding.
    """
    sizes = np.asarray(corpus.sizes)
    ends = np.cumsum(sizes)
    fitting = _fitting_buckets(buckets, all_lengths(corpus), int(ends[-1]))
    for number, bucket in enumerate(buckets or ({},)):
        rows = np.flatnonzero(fitting == number)
        size = batch_size if isinstance(batch_size, int) else batch_size[number]
        for start in range(0, len(rows), size):
            batches: dict[str, np.ndarray] = {}
            picked = rows[start : start + size]
            users = np.searchsorted(ends, picked, side="right")
            for slot, (user, row) in enumerate(zip(users, picked, strict=True)):
                example = corpus.get(int(user), [int(row - ends[user] + sizes[user])])[0]
                place(batches, (slot,), (size,), example, bucket, keep)
            if owners:
                batches["user"] = np.full(size, -1, np.int32)
                batches["user"][: len(users)] = users
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
      keep: names of the arrays that the loss needs; default all.

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
        keep: Sequence[str] | None = None,
        stream: Stream = Stream.CENTRAL,
    ) -> None:
        if (batch_size is None) == (frames is None):
            raise UserError("set exactly one of the central batch size and batch frames")
        self._corpus, self._buckets, self._seed, self._keep = corpus, tuple(buckets), seed, keep
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
            if frames < (longest := int(self._lengths.max())):
                raise UserError(f"a batch of {frames} frames is shorter than an example: {longest}")
            # Any order has at least so many batches; a short last one may be left out.
            self._per_pass = (int(self._lengths.sum()) - longest) // frames + 1
        self._fitting = None
        if len(self._buckets) > 1:
            self._fitting = _fitting_buckets(self._buckets, all_lengths(corpus), total)
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
                parts = self._by_bucket(order)
            if self._fitting is not None:
                parts = [parts[i] for i in rng.permutation(len(parts))]
            self._order = (number, parts)
        return self._order[1]

    def _by_bucket(self, order: np.ndarray) -> list[np.ndarray]:
        """Batches of as many examples as `frames` has room for, at least as many as a pass takes.

        `order` is by bucket. What is left of a bucket joins the next.
        """
        parts, left = [], order[:0]
        for number in range(len(self._buckets)):
            left = np.concatenate([left, order[self._fitting[order] == number]])
            room = self._room(number)
            full = len(left) // room * room
            parts += list(left[:full].reshape(-1, room))
            left = left[full:]
        return parts if len(parts) >= self._per_pass else [*parts, left]

    def _room(self, bucket: int) -> int:
        """How many examples of a bucket make a batch of `frames`."""
        room = max(1, self._frames // next(iter(self._buckets[bucket].values())))
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
        fitting = _fitting_buckets(self._buckets, every, int(self._ends[-1]))
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
            slots = self._room(bucket)  # one number for each bucket is one program
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
            place(batches, (slot,), (slots,), example, bucket, self._keep)
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


class Prefetcher:
    """Runs an iterator in a background thread, a few items ahead; use it as a context manager.

    Args:
      items: its `__next__` runs in the thread; an exception there is raised here, in its place.
      depth: how many finished items may wait.
      transfer: applied to each item in the thread, such as `jax.device_put`.
    """

    _END = object()

    def __init__(
        self,
        items: Iterable[Any],
        depth: int = 2,
        transfer: Callable[[Any], Any] = lambda item: item,
    ) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items, transfer), daemon=True)
        self._thread.start()

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _work(self, items: Iterable[Any], transfer: Callable[[Any], Any]) -> None:
        try:
            for item in items:
                self._put((transfer(item), None))
                if self._stop.is_set():
                    return
            self._put((self._END, None))
        except BaseException as error:
            self._put((None, error))

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Any]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            if item is self._END:
                return
            yield item
