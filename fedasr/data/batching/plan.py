"""Which examples make each of a client's batches: pure functions of (seed, round, user)."""

from dataclasses import dataclass

import numpy as np

from fedasr.errors import UserError
from fedasr.streams import Stream, generator


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


def pack_sorted(lengths: np.ndarray, frames: int, buffer: int) -> list[list[np.ndarray]]:
    """Cuts a sequence of examples into batches of at most `frames` padded frames, as published.

    So many examples at a time (`buffer`) are put in the order of their lengths, and from the
    shortest on each batch takes as many as fit, all padded to its longest; an example longer than
    `frames` is alone (arXiv 2310.00098, whose authors' programs batch so).

    Args:
      lengths: frames of each example, in order.
      frames: of a padded batch. buffer: examples.

    Returns:
      Positions in `lengths`, batch by batch, none empty; buffer by buffer.
    """
    found = []
    for start in range(0, len(lengths), buffer):
        order = start + np.argsort(lengths[start : start + buffer], kind="stable")
        batches, first = [], 0
        for i, position in enumerate(order):
            if i > first and (i - first + 1) * lengths[position] > frames:
                batches.append(order[first:i])
                first = i
        found.append([*batches, order[first:]])
    return found


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
    buffer: with frames, the examples that are sorted by length before they are cut (see
      `pack_sorted`): a batch then holds at most so many frames, padding counted.
    """

    batch_size: int | None = None
    steps: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    frames: int | None = None
    buffer: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("set exactly one of the client's steps and epochs")
        if (self.batch_size is None) == (self.frames is None):
            raise UserError("set exactly one of the client's batch size and batch frames")
        if self.buffer is not None and self.frames is None:
            raise UserError(
                "the client's batch_buffer sorts batches measured in seconds: set batch_seconds"
            )
        counts = (
            self.batch_size,
            self.steps,
            self.epochs,
            self.max_steps,
            self.frames,
            self.buffer,
        )
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
            assert lengths is not None  # where batches are measured in frames
            return self._of_frames(rng, size, self.frames, lengths)
        assert self.batch_size is not None  # where they are not measured in frames
        if self.steps is not None:
            batch = min(self.batch_size, size)
            passes = -(-self.steps * batch // size)
            stream = np.concatenate([rng.permutation(size) for _ in range(passes)])
            return list(stream[: self.steps * batch].reshape(self.steps, batch))
        batches: list[np.ndarray] = []
        for _ in range(self.epochs or 0):
            order = rng.permutation(size)
            batches += [order[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        return batches[: self.max_steps]

    def _of_frames(
        self, rng: np.random.Generator, size: int, frames: int, lengths: np.ndarray
    ) -> list[np.ndarray]:
        """As `plan`, of batches of about so many frames."""
        batches: list[np.ndarray] = []
        for _ in range(self.epochs or self.steps or 0):
            order = rng.permutation(size)
            if self.buffer is None:
                batches += [order[part] for part in pack(lengths[order], frames)]
            else:
                for parts in pack_sorted(lengths[order], frames, self.buffer):
                    batches += [order[parts[i]] for i in rng.permutation(len(parts))]
            if self.steps is not None and len(batches) >= self.steps:
                break
        return batches[: self.steps or self.max_steps]
