"""Local parameters: variables of the model that belong to a client and never leave it.

A client's own values are one *row* of float32. The simulation takes the cohort's rows from a
`LocalStore`, a client trains its own with the rest, and they go back to the store. They are in no
sum, have no clipping bound, no noise and no server optimiser, and are not uploaded: what a client
sends is its update of the shared variables alone (Arivazhagan et al., 2019, "Federated learning
with personalization layers"; Bui et al., 2019, "Federated user representation learning").

To the privacy of the shared variables a client that remembers makes no difference. What it sends
in a round is a function of its own data, of its own turns so far and of models that were released
with noise, and is clipped as ever: whatever it remembers, the sum without it differs by at most C.
A prototype made of other clients' rows would be such another path; see `LocalStore`.
"""

import dataclasses
import hashlib
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError
from fedasr.federated.client import ClientMetrics, ClientUpdate, Params
from fedasr.federated.subset import matches, merge, select
from fedasr.fields import check_local

PROTOTYPES = ("init", "mean", "last")
ROWS_FILE, SLOTS_FILE = "rows.f32", "slots.i64"
_PAIR = 16  # bytes of a record of the slots' file
_PATIENCE = (0.0, 0.1, 1.0, 10.0)  # seconds before a process reads again what another wrote
_BLOCK = 4096  # rows read at a time for a mean
REMEDY = (
    "put the files there back from a copy; or, to train again from the start, remove the run's "
    "folder of checkpoints"
)

# (params, row, ...) -> (delta of the shared variables, metrics, new row); else as `ClientUpdate`.
LocalUpdate = Callable[..., tuple[Params, ClientMetrics, jax.Array]]


class Rows(Protocol):
    """How something that stays with each user lies in a row of a store.

    Attributes:
      local, trained, shared: for each variable of the model in order, whether it stays with users,
        whether clients train it (None for all), and whether they send an update of it.
      size: numbers in a row.
      personal: what makes a user's own model of it; None or False where it holds no part of one.
    """

    @property
    def local(self) -> tuple[bool, ...]: ...

    @property
    def trained(self) -> tuple[bool, ...] | None: ...

    @property
    def shared(self) -> list[bool]: ...

    @property
    def size(self) -> int: ...

    @property
    def personal(self) -> Any: ...

    def extract(self, params: Params) -> Any:
        """What a user who has not been met starts from, float32 [size]."""

    def insert(self, params: Params, row: jax.Array) -> Params:
        """The model of a user with that row."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which of a model's variables are local, and how they lie in a row.

    local, trained: for each variable in order; `trained` None if clients train all. shapes: of the
    local ones.
    """

    local: tuple[bool, ...]
    trained: tuple[bool, ...] | None
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def personal(self) -> bool:
        """Whether rows make models of the users' own: these do."""
        return True

    @property
    def shared(self) -> list[bool]:
        """For each variable in order, whether clients train it and send its update."""
        trained = self.trained or (True,) * len(self.local)
        return [t and not stays for t, stays in zip(trained, self.local, strict=True)]

    def extract(self, tree: Params) -> jax.Array:
        """The local variables of a tree shaped like the model's as a row, float32 [size]."""
        leaves = zip(jax.tree.leaves(tree), self.local, strict=True)
        rows = [jnp.ravel(x).astype(jnp.float32) for x, stays in leaves if stays]
        return jnp.concatenate(rows)

    def insert(self, params: Params, row: jax.Array) -> Params:
        """The parameters with a row's values, in the variables' dtypes."""
        like = [x for x, stays in zip(jax.tree.leaves(params), self.local, strict=True) if stays]
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = jnp.split(row, ends[:-1])
        values = [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, like, strict=True)]
        return merge(values, params, self.local)


def make_layout(
    params: Params, patterns: Sequence[str], trained: Sequence[bool] | None = None
) -> Layout:
    """The layout of the variables whose paths match.

    Args:
      params: any pytree of arrays or of their shapes.
      patterns: see `fedasr.federated.subset.matches`.
      trained: for each variable in order, whether clients train it; None for all.

    Raises:
      UserError: for a bad pattern, one that matches nothing or what is not trained, or none left
        to share.
    """
    local = matches(params, patterns, "local.patterns")
    shapes = [
        tuple(x.shape) for x, stays in zip(jax.tree.leaves(params), local, strict=True) if stays
    ]
    layout = Layout(tuple(local), None if trained is None else tuple(trained), tuple(shapes))
    if not shapes:
        raise UserError("local.patterns: no variable would be local")
    if trained is not None and any(o and not t for o, t in zip(local, trained, strict=True)):
        raise UserError("local.patterns: clients must train what is local: add it to what they do")
    if not any(layout.shared):
        raise UserError("local.patterns: nothing would be left to share")
    return layout


def with_local(client_update: ClientUpdate, layout: Layout) -> LocalUpdate:
    """Local training from a client's own row.

    Args:
      client_update: its deltas hold what `layout.trained` says.
      layout: which of them stay with the client.
    """

    def update(params, row, *args, **kwargs):
        start = layout.insert(params, row)
        delta, metrics = client_update(start, *args, **kwargs)
        whole = merge(delta, jax.tree.map(jnp.zeros_like, start), layout.trained)
        return select(whole, layout.shared), metrics, row - layout.extract(whole)

    return update


class LocalStore:
    """The rows of many clients, on disk, read and written one by one.

    Rows are versioned. A round writes each row to a free slot, never over the one before, and a
    slot's record (round, user), which makes it count, is written after its values. So the rows as
    they were after any round since the last `release` can be had again (`restore`), however the
    process ended: after `kill -9`, a checkpoint of the model and the rows of its round are what
    they were. With `flush` before a checkpoint is saved, also after a power failure. Whether they
    are is told by `digest`, which a checkpoint keeps.

    Two files: `rows.f32`, float32 [slots, size]; and `slots.i64`, int64 pairs, first (size,
    users), then of each slot (round, user), round 0 for a free one. Rounds are counted from 1. The
    round comes first so that half a pair counts for nothing: it is later than any checkpoint.

    Args:
      folder: made if missing, unless `read_only`.
      layout: of the rows.
      users: how many there are.
      prototype: what a user without a row of their own starts from: "init", the local variables of
        the model's parameters; "mean", the mean of all rows; or "last", the row of the last user
        before them in the corpus's order who has one (of users outside of it: the last at all).
        While there is no row, "init". With "mean" or "last" users see something of each other's
        rows, and what they then send depends on it, which no clipping bounds: not for runs that
        state a privacy. ("mean" reads all the rows in every round with a new user.)
      read_only: changes nothing on disk. What is written is kept book of, as by a process beside
        the one that writes: rows are then read from what that has written.

    Raises:
      UserError: for an unknown prototype, or files that are damaged or of another layout or number
        of users.
    """

    def __init__(
        self,
        folder: str | Path,
        layout: Rows,
        users: int,
        prototype: str = "init",
        *,
        read_only: bool = False,
    ) -> None:
        check_prototype(prototype)
        check_local("folder", folder)
        self.layout, self.users, self.prototype = layout, users, prototype
        self.round: int | None = None
        self.read_only = read_only
        folder = Path(folder)
        try:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
                for name in (ROWS_FILE, SLOTS_FILE):
                    (folder / name).touch()
            mode = "rb" if read_only else "r+b"
            self._rows, self._slots = (
                io.FileIO(folder / name, mode) for name in (ROWS_FILE, SLOTS_FILE)
            )
        except OSError as error:
            raise UserError(f"cannot open the local parameters in {folder}: {error}") from error
        self.folder = folder
        records = self._records()
        ours = (layout.size, users)
        if not len(records) and not read_only:
            _write(self._slots, 0, np.array(ours, np.int64))
        elif not len(records) or tuple(records[0]) != ours:
            raise UserError(
                f"{folder} holds the local parameters of another model or population, or "
                f"{SLOTS_FILE} there is damaged ((numbers, users) "
                f"{tuple(map(int, records[:1].ravel()))}, here {ours}): {REMEDY}"
            )
        if len(records) < 2:
            self.restore(0)

    def _records(self) -> np.ndarray:
        self._slots.seek(0)
        data = self._slots.read()
        return np.frombuffer(data[: len(data) // _PAIR * _PAIR], np.int64).reshape(-1, 2)

    def restore(self, round: int, forget: bool = True) -> None:
        """The rows as they were after `round`; what was written later is forgotten for good.

        Args:
          round: rounds done, not before the last `release`; 0 for no rows.
          forget: False to look only: no row may be written after it.
        """
        written, user = self._records()[1:].T
        if forget and not self.read_only:
            for slot in np.flatnonzero(written > round):
                self._record(int(slot), 0, 0)
        used = np.flatnonzero((written > 0) & (written <= round))
        if ((user[used] < 0) | (user[used] >= self.users)).any():
            raise UserError(f"{self.folder / SLOTS_FILE} is damaged: {REMEDY}")
        used = used[np.lexsort((written[used], user[used]))]
        last = np.diff(user[used], append=-1) != 0  # the last of each user's versions
        self._slot = np.full(self.users, -1, np.int64)
        self._slot[user[used[last]]] = used[last]
        # A version is needed until the round that wrote the next one.
        self._old = [
            (int(written[after]), int(slot))
            for slot, after, ends in zip(used[:-1], used[1:], last[:-1], strict=True)
            if not ends
        ]
        self._free = [int(x) for x in np.flatnonzero((written == 0) | (written > round))[::-1]]
        self._count = len(user)
        self._written: list[tuple[int, int, int]] = []
        self._sums = np.zeros(self.users, np.uint64)  # of users' rows; 0 for one not read yet
        self._mean: np.ndarray | None = None
        self.round = int(round)

    @property
    def known(self) -> np.ndarray:
        """Whether each user has a row of their own, bool [users]."""
        return self._slot >= 0

    def gather(self, users: Sequence[int] | np.ndarray, init: np.ndarray) -> np.ndarray:
        """Rows as of the last round that was committed, whatever was written since.

        Args:
          users: indices; -1 for somebody outside of the corpus.
          init: float32 [size], the row that the model's parameters hold.

        Returns:
          float32 [len(users), size]; the prototype for users without a row.
        """
        rows = np.empty((len(users), self.layout.size), np.float32)
        for row, user in zip(rows, np.asarray(users, np.int64), strict=True):
            slot = self._slot[user] if user >= 0 else -1
            if slot < 0:  # nobody's: see `_read` for those of users
                row[:] = self._prototype(int(user), init)
            else:
                self._read(int(user), row)
        return rows

    def rows_of(self, index: np.ndarray, params: Params) -> Callable[[np.ndarray], np.ndarray]:
        """What an evaluation needs: from users of another corpus to their rows.

        Args:
          index: of each of its users in this store, -1 for somebody else.
          params: the model's, for users without a row.

        Returns:
          A function from users, int [b], -1 for nobody, to float32 [b, size].
        """
        init = np.asarray(self.layout.extract(params))
        return lambda users: self.gather(np.where(users >= 0, index[users], -1), init)

    def write(self, users: Sequence[int] | np.ndarray, rows: np.ndarray) -> None:
        """Writes rows of the round under way, float32 [len(users), size]; each user's once."""
        rows = np.ascontiguousarray(rows, np.float32)
        for user, row in zip(np.asarray(users, np.int64), rows, strict=True):
            if self._free:
                slot = self._free.pop()
            else:
                slot, self._count = self._count, self._count + 1
            if not self.read_only:
                _write(self._rows, slot * row.nbytes, row)
            self._record(slot, self._next_round(), int(user))
            self._written.append((int(user), slot, _checksum(row)))

    def discard(self) -> None:
        """Forgets what was written since the last round that was committed."""
        for _, slot, _ in self._written:
            self._record(slot, 0, 0)
            self._free.append(slot)
        self._written = []

    def commit(self) -> None:
        """Ends the round: what was written is what `gather` reads."""
        self.round = self._next_round()
        for user, slot, checksum in self._written:
            self._sums[user] = checksum
            if (old := int(self._slot[user])) >= 0:
                self._old.append((self.round, old))
            self._slot[user] = slot
        self._written, self._mean = [], None

    def digest(self) -> str:
        """Tells the rows of the last round that was committed from all others, 16 hex digits.

        Reads those that were not written since the last `restore`, once.

        Raises:
          UserError: a file is shorter than it was.
        """
        known = np.flatnonzero(self.known)
        row = np.empty(self.layout.size, np.float32)
        for user in known[self._sums[known] == 0]:
            self._read(int(user), row)
        all_of_them = np.stack([known.astype("<u8"), self._sums[known].astype("<u8")])
        return hashlib.sha256(all_of_them.tobytes()).hexdigest()[:16]

    def advance(self, round: int) -> None:
        """Makes `round` the next to be written: no row has changed in those before it.

        Raises:
          UserError: it is not later than the last.
        """
        if round < self._next_round():
            raise UserError(f"the local parameters are of round {self.round}, not before {round}")
        self.round = round - 1

    def flush(self) -> None:
        """Returns when all that was written is on the disk itself."""
        for file in () if self.read_only else (self._rows, self._slots):
            os.fsync(file.fileno())

    def release(self, round: int) -> None:
        """Makes room: no `restore` of a round before this one will be asked for."""
        self._free += [slot for until, slot in self._old if until <= round]
        self._old = [(until, slot) for until, slot in self._old if until > round]

    def summary(self) -> dict[str, Any]:
        """{"parameters": in a row, "users": with one, "bytes": of all theirs, "prototype"}."""
        users, size = int(self.known.sum()), self.layout.size
        return {
            "parameters": size,
            "users": users,
            "bytes": 4 * users * size,
            "prototype": self.prototype,
        }

    def close(self) -> None:
        """Closes the files."""
        for file in (self._rows, self._slots):
            file.close()

    def __enter__(self) -> "LocalStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next_round(self) -> int:
        if self.round is None:
            raise UserError("the local parameters are of no round yet: restore them to one")
        return self.round + 1

    def _prototype(self, user: int, init: np.ndarray) -> np.ndarray:
        if self.prototype == "init" or not self.known.any():
            return init
        known = np.flatnonzero(self.known)
        if self.prototype == "mean":
            if self._mean is None:
                # Anew and in one order, so that a resumed run has the same to the last bit.
                total = np.zeros(self.layout.size)
                for start in range(0, len(known), _BLOCK):
                    total += self.gather(known[start : start + _BLOCK], init).sum(0, np.float64)
                self._mean = (total / len(known)).astype(np.float32)
            return self._mean
        before = known if user < 0 else known[known < user]
        if not len(before):
            return init
        row = np.empty(self.layout.size, np.float32)
        self._read(int(before[-1]), row)
        return row

    def _record(self, slot: int, round: int, user: int) -> None:
        if not self.read_only:
            _write(self._slots, (1 + int(slot)) * _PAIR, np.array([round, user], np.int64))

    def _read(self, user: int, row: np.ndarray) -> None:
        """Fills in a user's row, which is the one that was written.

        Raises:
          UserError: it is not.
        """
        slot = int(self._slot[user])
        for seconds in _PATIENCE if self.read_only else (0.0,):
            time.sleep(seconds)  # another host's file system may show late what was written
            whole = self._fill(slot, row)
            checksum = _checksum(row)
            if whole and self._sums[user] in (0, checksum):
                self._sums[user] = checksum
                return
        what = "not what it was" if whole else f"shorter than {SLOTS_FILE} says"
        raise UserError(f"{self.folder / ROWS_FILE} is {what}: {REMEDY}")

    def _fill(self, slot: int, row: np.ndarray) -> bool:
        """Reads a row, and whether all of it was there."""
        self._rows.seek(slot * row.nbytes)
        view = row.data.cast("B")
        done = 0
        while done < len(view):
            if not (got := self._rows.readinto(view[done:])):
                return False
            done += got
        return True


def remove_rows(folder: str | Path) -> None:
    """Forgets all the rows in a folder; nothing else that lies there."""
    for name in (ROWS_FILE, SLOTS_FILE):
        (Path(folder) / name).unlink(missing_ok=True)


def check_prototype(prototype: str) -> None:
    """Raises UserError for an unknown one."""
    if prototype not in PROTOTYPES:
        raise UserError(f"local.prototype={prototype!r}: choose one of {', '.join(PROTOTYPES)}")


def _checksum(row: np.ndarray) -> int:
    """64 bits of a row's values, float32 [size]; never 0."""
    return int.from_bytes(hashlib.blake2b(row.data, digest_size=8).digest(), "little") or 1


def _write(file: Any, offset: int, values: np.ndarray) -> None:
    file.seek(offset)
    view = values.data.cast("B")
    done = 0
    while done < len(view):
        done += file.write(view[done:])
