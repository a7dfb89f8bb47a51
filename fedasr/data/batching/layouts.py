"""How the data of clients lies in a chunk: padded batches, or examples once with indices.

A layout is a class with the members of `Layout`. In which form a client's data lies follows from
its own data and from settings alone: other users' data may not change how its update is rounded.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedasr.data.batching import arrays as memory
from fedasr.data.batching.parts import Division
from fedasr.data.batching.plan import LocalBatches
from fedasr.data.batching.types import Bucket, Resident, Shape, Store
from fedasr.data.corpus import Corpus, Example
from fedasr.errors import UserError


class Form(NamedTuple):
    """All that the arrays of a client's batches are shaped by: of the client's own data alone.

    shapes: that its batches, or their parts, are computed in. level: 4^level examples have room.
    parts: room for those of a batch.
    """

    shapes: tuple[Shape, ...]
    level: int
    parts: int


class Client(NamedTuple):
    """plan: indices of the examples of each batch. real: their elements, of axis 0, in all.

    parts: of each batch, the shape and the number of examples of each of its parts.
    wanted, where: the examples of the plan, each once, and for all its indices which of these.
    lengths: of `wanted`, by ragged array.
    """

    user: int
    form: Form
    plan: list[np.ndarray]
    parts: list[list[tuple[int, int]]]
    real: int
    wanted: np.ndarray
    where: np.ndarray
    lengths: dict[str, np.ndarray]


class Source:
    """Where layouts read: a corpus, of whose arrays some are kept.

    Args:
      corpus: of the users.
      select: names of the arrays that the loss needs; None for all.
    """

    def __init__(self, corpus: Corpus, select: Sequence[str] | None) -> None:
        self._corpus, self._select = corpus, select
        self.varying = frozenset(corpus.lengths(0))
        self._sample: dict[str, np.ndarray] | None = None

    def examples(self, client: Client) -> list[Example]:
        """Those that the client's plan wants, each once."""
        return self._corpus.get(client.user, client.wanted.tolist())

    def kept(self, example: Example) -> dict[str, np.ndarray]:
        """The arrays that the loss needs."""
        names = [n for n in example if self._select is None or n in self._select]
        return {name: np.asarray(example[name]) for name in names}

    def template(self, client: Client) -> dict[str, np.ndarray]:
        """An example's names and dtypes, and its sizes without those that vary."""
        if self._sample is None:
            example = self.kept(self._corpus.get(client.user, [int(client.wanted[0])])[0])
            self._sample = {n: x[:0] if n in self.varying else x for n, x in example.items()}
        return self._sample


Held = Sequence[tuple[int, Client]]  # the clients whose data this process needs, at their rows


class Layout(Protocol):
    """How the data of clients of one form lies in a chunk."""

    def form(
        self, shapes: tuple[Shape, ...], steps: int, parts: int, lengths: Mapping[str, np.ndarray]
    ) -> Form:
        """The smallest form with room for a client.

        Args:
          shapes: that its parts are computed in. steps, parts: batches, and parts of one at most.
          lengths: int [examples] of each ragged array, of the examples that are wanted, and under
            "" for every example 1.
        """
        ...

    def bytes(self, form: Form, example: Callable[[], Mapping[str, np.ndarray]]) -> int:
        """What a chunk holds of each client, indices aside; `example`: see `Source.template`."""
        ...

    def batches(self, clients: Sequence[Client], held: Held, rows: int) -> Any:
        """The arrays of a chunk of so many rows (numpy): `Chunk.batches`."""
        ...


class Dense:
    """Every batch, padded: as small as any where their number and size are fixed.

    Args:
      source: where examples are.
      local: how they become batches: with steps and batch_size.
      buckets: padded lengths.
    """

    def __init__(self, source: Source, local: LocalBatches, buckets: Sequence[Bucket]) -> None:
        if local.steps is None or local.batch_size is None:
            raise UserError("dense batches need a number of steps and a batch size")
        self._source, self._buckets, self._steps = source, buckets or ({},), local.steps

    def form(
        self, shapes: tuple[Shape, ...], steps: int, parts: int, lengths: Mapping[str, np.ndarray]
    ) -> Form:
        """See `Layout`."""
        del steps, parts, lengths
        return Form(shapes, 0, 1)

    def bytes(self, form: Form, example: Callable[[], Mapping[str, np.ndarray]]) -> int:
        """See `Layout`."""
        (shape,) = form.shapes
        bucket = self._buckets[shape.bucket]
        slots = self._steps * shape.slots
        return sum(
            slots
            * value.dtype.itemsize
            * math.prod(value.shape[name in bucket :])
            * bucket.get(name, 1)
            for name, value in example().items()
        )

    def batches(self, clients: Sequence[Client], held: Held, rows: int) -> dict[str, np.ndarray]:
        """See `Layout`."""
        (shape,) = clients[0].form.shapes
        bucket = self._buckets[shape.bucket]
        size = (rows, self._steps, shape.slots)
        batches: dict[str, np.ndarray] = {}
        mask = np.zeros(size, np.bool_)
        if not held:
            memory.write_example(
                batches, (0, 0, 0), size, self._source.template(clients[0]), bucket, fill=False
            )
        for position, client in held:
            examples = self._source.examples(client)
            if not batches:
                first = self._source.kept(examples[0])
                memory.write_example(batches, (0, 0, 0), size, first, bucket, fill=False)
            per_batch = len(client.plan[0])  # the same in all of the plan's
            mask[position, :, :per_batch] = True
            picked = client.where.tolist()
            for name in first:
                values = [examples[i][name] for i in picked]
                _fill(batches, name, position, values, per_batch, bucket.get(name))
        batches["mask"] = mask
        if not mask.all():
            for array in batches.values():
                array[~mask] = 0
        return batches


def _fill(
    batches: dict[str, np.ndarray],
    name: str,
    position: int,
    values: Sequence[np.ndarray],
    per_batch: int,
    room: int | None,
) -> None:
    """Writes a client's examples, batch by batch, padded to `room` where that is given."""
    own = batches[name][position]
    places = list(itertools.product(range(own.shape[0]), range(per_batch)))
    if room is None:
        for at, value in zip(places, values, strict=True):
            own[at] = value
        return
    lengths = [len(value) for value in values]
    for at, value, length in zip(places, values, lengths, strict=True):
        own[at][:length] = value
        if length < room:
            own[at][length:] = 0
    batches[f"{name}_length"][position, :, :per_batch] = np.reshape(lengths, (-1, per_batch))


class Ragged:
    """A `Store`: each example once, and indices that say which make each batch.

    Args:
      source: where examples are.
      local: how they become batches.
      buckets: padded lengths; the first array that they name is what frames are counted in.
      division: of the batches.
    """

    def __init__(
        self,
        source: Source,
        local: LocalBatches,
        buckets: Sequence[Bucket],
        division: Division,
    ) -> None:
        self._source, self._local, self._division = source, local, division
        self._buckets = buckets or ({},)
        self._unit = next(iter(self._buckets[0]), None)

    def form(
        self, shapes: tuple[Shape, ...], steps: int, parts: int, lengths: Mapping[str, np.ndarray]
    ) -> Form:
        """See `Layout`."""
        need = {"steps": steps, "examples": len(lengths[""])}
        need |= {f"/{name}": int(values.sum()) for name, values in lengths.items() if name}
        return self._smallest(Form(shapes, 0, self._division.room(shapes, parts)), need)

    def _smallest(self, form: Form, need: Mapping[str, int]) -> Form:
        while any(size > self._room(form).get(name, size) for name, size in need.items()):
            form = form._replace(level=form.level + 1)
        return form

    def _room(self, form: Form) -> dict[str, int]:
        """What a `Store` has room for: "steps", "examples" and, of each ragged array, "/name".

        All together by powers of 4: sizes rounded one by one would be many more shapes to compile.
        What is too large costs memory and transfer, but no computation: the loop's bound is a
        traced value.
        """
        local, examples = self._local, 4**form.level
        bucket = self._buckets[form.shapes[0].bucket]
        # An example is about half as long as the longest.
        room = {f"/{name}": examples * -(-size // 2) for name, size in bucket.items()}
        passes = examples
        if local.batch_size is not None:
            passes = -(-examples // local.batch_size)
        elif self._unit is not None:
            passes = min(examples, -(-room[f"/{self._unit}"] // (local.frames or 1)))
        steps = local.steps or min((local.epochs or 1) * passes, local.max_steps or math.inf)
        return room | {"examples": examples, "steps": int(steps)}

    def bytes(self, form: Form, example: Callable[[], Mapping[str, np.ndarray]]) -> int:
        """See `Layout`."""
        bucket, room, total = self._buckets[form.shapes[0].bucket], self._room(form), 0
        for name, value in example().items():
            size = value.dtype.itemsize * math.prod(value.shape[name in bucket :])
            if name in self._source.varying:
                total += size * room[f"/{name}"]
            else:
                total += size * room["examples"] * (len(value) if name in bucket else 1)
        return total

    def batches(self, clients: Sequence[Client], held: Held, rows: int) -> Store:
        """See `Layout`."""
        form = clients[0].form
        bucket, sizes = self._buckets[form.shapes[0].bucket], self._room(form)
        read = {position: self._source.examples(client) for position, client in held}
        first = next(iter(read.values()))[0] if read else self._source.template(clients[0])
        first = self._source.kept(first)
        arrays, offsets, lengths = {}, {}, {}
        room = sizes["examples"]
        for name, value in first.items():
            if name not in bucket:
                arrays[name] = memory.zeros(name, (rows, room, *value.shape), value.dtype)
                for position, examples in read.items():
                    arrays[name][position, : len(examples)] = [x[name] for x in examples]
                continue
            varies = name in self._source.varying
            frames = sizes[f"/{name}"] if varies else room * len(value)
            arrays[name] = memory.unfilled(name, (rows, frames, *value.shape[1:]), value.dtype)
            arrays[name][[row for row in range(rows) if row not in read]] = 0
            of_rows = {position: [x[name] for x in examples] for position, examples in read.items()}
            offsets[name], lengths[name] = _lay_out(arrays[name], of_rows, room)
        indices = self._indices(form, held, rows, {c.user: c.where for _, c in held})
        spans = self._spans(form, rows, [name for name in first if name in bucket])
        return Store(indices[0], arrays, offsets, lengths, spans, *indices[1:])

    def _indices(
        self, form: Form, held: Held, rows: int, numbers: Mapping[int, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """index, kinds and parts of a `Store`; `numbers`: a user's examples in the plan's order."""
        parts = np.zeros((rows, self._room(form)["steps"]), np.int32)
        kinds = np.zeros((*parts.shape, form.parts), np.int32)
        index = np.full((*kinds.shape, max(shape.slots for shape in form.shapes)), -1, np.int32)
        for position, client in held:
            begin, number = 0, numbers[client.user]
            for step, own in enumerate(client.parts):
                parts[position, step] = len(own)
                for part, (kind, size) in enumerate(own):
                    kinds[position, step, part] = kind
                    index[position, step, part, :size] = number[begin : begin + size]
                    begin += size
        return index, kinds, parts

    def _spans(self, form: Form, rows: int, ragged: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """spans of a `Store`."""
        return [
            {"": np.zeros((rows, shape.slots), np.bool_)}
            | {
                name: np.zeros((rows, self._buckets[shape.bucket][name]), np.bool_)
                for name in ragged
            }
            for shape in form.shapes
        ]


def _lay_out(
    array: np.ndarray, of_rows: Mapping[int, Sequence[np.ndarray]], room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Writes each row's values behind one another, zeros after them.

    Args:
      array: [rows, frames, ...], written to; rows that are not in `of_rows` stay as they are.
      of_rows: the values by row, [frames of its own, ...] each.
      room: most values of a row.

    Returns:
      where each begins, and how long it is: int32 [rows, room].
    """
    offsets, lengths = np.zeros((2, len(array), room), np.int32)
    for row, values in of_rows.items():
        size = np.array([len(value) for value in values])
        ends = np.cumsum(size)
        np.concatenate(values, out=array[row, : ends[-1]])
        array[row, ends[-1] :] = 0
        offsets[row, : len(size)] = ends - size
        lengths[row, : len(size)] = size
    return offsets, lengths


class OnDevice(Ragged):
    """A `Store` without its examples, which are on the device already: indices of all users'.

    Args:
      resident: the examples, from `make_resident`. sizes: int [users], of the same corpus.
      source, local, buckets, division: as of `Ragged`; nothing is read.

    Raises:
      UserError: they are those of another corpus.
    """

    def __init__(
        self,
        resident: Resident,
        sizes: np.ndarray,
        source: Source,
        local: LocalBatches,
        buckets: Sequence[Bucket],
        division: Division,
    ) -> None:
        super().__init__(source, local, buckets, division)
        sizes = np.asarray(sizes, np.int64)
        whole = {**resident.arrays, **resident.offsets}
        if any(len(x) != sizes.sum() for x in whole.values()):
            raise UserError("the resident examples are those of another corpus")
        self._ragged = list(resident.offsets)
        self._before = np.cumsum(sizes) - sizes  # examples of users before each

    def form(
        self, shapes: tuple[Shape, ...], steps: int, parts: int, lengths: Mapping[str, np.ndarray]
    ) -> Form:
        """See `Layout`; the examples need no room."""
        del lengths
        form = Form(shapes, 0, self._division.room(shapes, parts))
        return self._smallest(form, {"steps": steps})

    def bytes(self, form: Form, example: Callable[[], Mapping[str, np.ndarray]]) -> int:
        """See `Layout`."""
        return 0

    def batches(self, clients: Sequence[Client], held: Held, rows: int) -> Store:
        """See `Layout`."""
        form = clients[0].form
        numbers = {c.user: self._before[c.user] + c.wanted[c.where] for _, c in held}
        index, kinds, parts = self._indices(form, held, rows, numbers)
        spans = self._spans(form, rows, self._ragged)
        return Store(index, {}, {}, {}, spans, kinds, parts)
