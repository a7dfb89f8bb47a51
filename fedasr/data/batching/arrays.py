"""Arrays of a chunk: made where JAX takes them as they are, and filled with padded examples."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedasr.data.batching.types import Bucket
from fedasr.data.corpus import Example
from fedasr.errors import UserError

# Of one array of a chunk; beyond this a machine would be out of memory.
MAX_ARRAY_BYTES = 16 << 30
_ALIGNMENT = 64


def zeros(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros, as `unfilled`."""
    array = unfilled(name, shape, dtype)
    array.fill(0)
    return array


def unfilled(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that holds anything.

    Raises:
      UserError: it would be larger than `MAX_ARRAY_BYTES`; `name` says whose it is.
    """
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


def write_example(
    batches: dict[str, np.ndarray],
    position: tuple[int, ...],
    shape: tuple[int, ...],
    example: Example,
    bucket: Bucket,
    select: Sequence[str] | None = None,
    fill: bool = True,
) -> None:
    """Writes one example into zero-padded arrays of leading `shape`, making them when missing.

    Without `fill`, arrays that are made hold anything where no example is written.

    Raises:
      UserError: an array would be larger than `MAX_ARRAY_BYTES`.
    """
    for name, value in example.items():
        if select is not None and name not in select:
            continue
        value = np.asarray(value)
        tail = (bucket[name], *value.shape[1:]) if name in bucket else value.shape
        if name not in batches:
            make = zeros if fill else unfilled
            batches[name] = make(name, (*shape, *tail), value.dtype)
        if name in bucket:
            at: tuple[Any, ...] = position
            lengths = batches.setdefault(f"{name}_length", np.zeros(shape, np.int32))
            lengths[position] = len(value)
            batches[name][(*at, slice(len(value)))] = value
            batches[name][(*at, slice(len(value), None))] = 0
        else:
            batches[name][position] = value
    batches.setdefault("mask", np.zeros(shape, np.bool_))[position] = True
