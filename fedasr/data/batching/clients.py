"""From a round's cohort to chunks of clients that are trained together."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fedasr.data.batching.buckets import Grid, fitting_buckets
from fedasr.data.batching.layouts import Client, Dense, Form, Layout, OnDevice, Ragged, Source
from fedasr.data.batching.parts import Division, Micro, Whole, frames_of
from fedasr.data.batching.plan import LocalBatches
from fedasr.data.batching.types import Bucket, Chunk, Padding, Resident
from fedasr.data.corpus import Corpus, all_lengths
from fedasr.errors import UserError

# Of one device's clients that are trained in turns: enough for calls to cost little.
TURN_BYTES = 16 << 20


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
      select: names of the arrays that the loss needs; default all.
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
        select: Sequence[str] | None = None,
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
        cells = buckets.cells(all_lengths(corpus)) if isinstance(buckets, Grid) else tuple(buckets)
        self._unit = next(iter(cells[0]), None) if cells else None
        if local.frames is not None and self._unit is None:
            raise UserError("batches measured in frames need examples whose lengths vary")
        self._corpus, self._local, self._buckets = corpus, local, cells
        self._chunk_size, self._seed, self._turns = chunk_size, seed, turns
        self._devices, self._weights = devices, weights
        self._rows = range(chunk_size) if rows is None else range(chunk_size)[rows]
        self._frames = frames_of(cells)
        self._parted = micro_batch > 0
        self._division: Division = (
            Micro(micro_batch, local, grid, cells) if micro_batch else Whole(local)
        )
        self._source = Source(corpus, select)
        self._layout = self._choose(resident)

    def _choose(self, resident: Resident | None) -> Layout:
        """The layout that takes the least memory and the fewest programs."""
        source, local, cells = self._source, self._local, self._buckets
        if resident is not None:
            sizes = np.asarray(self._corpus.sizes)
            return OnDevice(resident, sizes, source, local, cells, self._division)
        # A fixed number of batches of a fixed size is as small dense, and one shape for everybody.
        if self._parted or local.steps is None or local.frames is not None:
            return Ragged(source, local, cells, self._division)
        return Dense(source, local, cells)

    def _client(self, user: int, round: int, seed: int) -> Client:
        lengths = self._corpus.lengths(user)
        size = int(self._corpus.sizes[user])
        unit = None
        if self._local.frames is not None and self._unit is not None:
            unit = np.asarray(lengths[self._unit])
        plan = self._local.plan(size, seed, round, user, unit)
        needs = fitting_buckets(self._buckets, lengths, size)
        plan, shapes, parts = self._division.divide(plan, needs)
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
        form = self._layout.form(
            shapes, len(plan), max(map(len, parts)), {"": np.ones(len(wanted))} | of_wanted
        )
        return Client(user, form, plan, parts, real, wanted, where, of_wanted)

    def chunks(
        self, users: Iterable[int], round: int, seed: int | None = None
    ) -> Iterator[tuple[Chunk, Padding]]:
        """Reads and pads the data of a round's cohort, chunk by chunk (numpy arrays)."""
        seed = self._seed if seed is None else seed
        clients = [self._client(int(user), round, seed) for user in users]
        clients.sort(key=self._position)
        for form, alike in itertools.groupby(clients, lambda client: client.form):
            group = list(alike)
            side_by_side = [
                group[start : start + self._chunk_size]
                for start in range(0, len(group), self._chunk_size)
            ]
            # The devices do not wait for each other between chunks: each has the most work in its
            # turn.
            side_by_side[1::2] = [together[::-1] for together in side_by_side[1::2]]
            turns = self._turns_of(form, group[0])
            for start in range(0, len(side_by_side), turns):
                yield self._build(side_by_side[start : start + turns], turns)

    def _position(self, client: Client) -> tuple[int, ...]:
        """Where a client comes in a round: clients of one form together, then by their work."""
        (slots, bucket), level, parts = client.form.shapes[0], *client.form[1:]
        # Devices side by side have like work where batches are in parts.
        work = client.real if self._parted else len(client.plan)
        return -bucket, -slots, -level, -parts, -work, client.user

    def _turns_of(self, form: Form, client: Client) -> int:
        """Clients of a form that a device trains in a call."""
        if self._turns == 1:
            return 1
        each = self._layout.bytes(form, lambda: self._source.template(client))
        return int(np.clip(TURN_BYTES // max(each, 1), 1, self._turns))

    def _build(self, turns: list[list[Client]], most: int) -> tuple[Chunk, Padding]:
        """A chunk of clients of one form, side by side, or in `turns` of at most so many."""
        clients = [client for turn in turns for client in turn]
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
        batches = self._layout.batches(clients, held, len(self._rows) * most)
        computed = self._computed(clients, num_steps.reshape(-1, per_device))
        chunk = Chunk(batches, num_steps[own], user[own], weight[own])
        return chunk, Padding(sum(c.real for c in clients), computed)

    def _computed(self, clients: Sequence[Client], num_steps: np.ndarray) -> int:
        """Elements that a chunk computes; num_steps: [devices and turns, clients side by side]."""
        frames = [shape.slots * self._frames[shape.bucket] for shape in clients[0].form.shapes]
        if self._parted:
            return sum(frames[kind] for c in clients for step in c.parts for kind, _ in step)
        return int(num_steps.max(axis=1).sum()) * num_steps.shape[1] * frames[0]

    def example_chunk(self, users: Iterable[int], round: int) -> Chunk | None:
        """The first chunk of a round with the data of one row, or of one device's turns, alone.

        None of an empty cohort.
        """
        one = copy.copy(self)
        one._rows = range(1)
        return next((chunk for chunk, _ in one.chunks(users, round)), None)
