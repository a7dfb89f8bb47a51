"""What the parts of batching pass to one another, and to the device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Bucket = Mapping[str, int]  # the padded length of axis 0 of every ragged array


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


class Shape(NamedTuple):
    """What a part of a batch is padded to: so many examples, and a bucket by its place."""

    slots: int
    bucket: int
