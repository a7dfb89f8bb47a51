"""How a client's batches are divided into what is computed at once: whole, or in parts.

All follows from the client's own lengths and from settings that are known before any data is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fedasr.data.batching.buckets import Grid, rounded_slots
from fedasr.data.batching.plan import LocalBatches
from fedasr.data.batching.types import Bucket, Shape
from fedasr.errors import UserError

# Doublings below a user's longest example for which parts of batches have shapes of their own.
_DOUBLINGS = 3.5


class Divided(NamedTuple):
    """plan: indices of the examples of each batch. shapes: that its parts are computed in.

    parts: of each batch, the shape and the number of examples of each of its parts.
    """

    plan: list[np.ndarray]
    shapes: tuple[Shape, ...]
    parts: list[list[tuple[int, int]]]


class Division(Protocol):
    """One way of dividing batches."""

    def divide(self, plan: list[np.ndarray], needs: np.ndarray) -> Divided:
        """Args: plan: indices of each batch. needs: int [examples], the bucket of each example."""
        ...

    def room(self, shapes: Sequence[Shape], parts: int) -> int:
        """Parts of a batch that arrays have room for, where a batch has up to `parts`."""
        ...


class Whole:
    """Each batch at once, in one shape for all of a client's."""

    def __init__(self, local: LocalBatches) -> None:
        self._batch_size = local.batch_size

    def divide(self, plan: list[np.ndarray], needs: np.ndarray) -> Divided:
        """See `Division`."""
        slots = self._batch_size or rounded_slots(max(map(len, plan)))
        shape = Shape(slots, int(needs[np.concatenate(plan)].max()))
        return Divided(plan, (shape,), [[(0, len(batch))] for batch in plan])

    def room(self, shapes: Sequence[Shape], parts: int) -> int:
        """See `Division`."""
        del shapes
        return parts


class Micro:
    """Parts of at most so many examples of like length, in the shapes of `part_shapes`.

    Args:
      slots: at most so many examples are computed together.
      local: how examples become batches.
      grid: whose cells the shapes are of. cells: of the corpus.

    Raises:
      UserError: examples have no lengths that vary.
    """

    def __init__(
        self, slots: int, local: LocalBatches, grid: Grid | None, cells: Sequence[Bucket]
    ) -> None:
        if grid is None or not cells:
            raise UserError(
                "batches in parts (micro_batch) need a Grid, and examples whose lengths vary"
            )
        self._local, self._frames = local, frames_of(cells)
        self._shapes: Mapping[int, tuple[Shape, ...]] = {
            top: part_shapes(top, slots, grid.per_doubling) for top in grid.tops(cells)
        }

    def divide(self, plan: list[np.ndarray], needs: np.ndarray) -> Divided:
        """See `Division`."""
        largest = int(needs[np.concatenate(plan)].max())
        plan = [batch[np.argsort(-needs[batch], kind="stable")] for batch in plan]
        shapes = self._shapes[min(top for top in self._shapes if top >= largest)]
        return Divided(plan, shapes, [self._parts(needs[batch], shapes) for batch in plan])

    def room(self, shapes: Sequence[Shape], parts: int) -> int:
        """See `Division`."""
        longest = self._frames[shapes[0].bucket]
        room = self._local.batch_size or -(-2 * (self._local.frames or 0) // longest)
        while room < parts:
            room *= 2
        return room

    def _parts(self, needs: np.ndarray, shapes: Sequence[Shape]) -> list[tuple[int, int]]:
        """The shape and the number of examples of each part of a batch (`needs`: descending)."""
        # A little more for a part than for its frames, so that of equals the fewest are taken.
        costs = [1 + shape.slots * self._frames[shape.bucket] for shape in shapes]
        _, kinds = cheapest(needs[None, ::-1], shapes, costs)
        parts, left = [], len(needs)
        while left:
            size = min(shapes[kinds[0, left]].slots, left)
            parts.append((int(kinds[0, left]), size))
            left -= size
        return parts


def frames_of(buckets: Sequence[Bucket]) -> list[int]:
    """The padded length, in each bucket, of the array that is named first; 1 where none is."""
    return [next(iter(bucket.values()), 1) for bucket in buckets] or [1]


def part_shapes(top: int, slots: int, per_doubling: int) -> tuple[Shape, ...]:
    """Shapes for the parts of a user's batches, from the user's longest example downwards.

    One for any single example, the others for `slots` examples of a cell.

    Args:
      top: the cell that holds the user's examples.
      slots: at most so many examples are computed together.
      per_doubling: of the grid.
    """
    cells = range(top, max(-1, top - math.ceil(_DOUBLINGS * per_doubling)), -1)
    return tuple(dict.fromkeys([Shape(1, top), *(Shape(slots, cell) for cell in cells)]))


def cheapest(
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
