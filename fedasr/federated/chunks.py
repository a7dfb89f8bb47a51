"""How many clients to vmap together on a device: as many as its memory holds."""

from collections.abc import Callable, Sequence

import jax

from fedasr.errors import UserError
from fedasr.federated import hosts

AUTO = "auto"
# Of the memory that the device reports: the rest is for what the estimate leaves out.
SHARE = 0.85


def fit_chunk(memory: Callable[[int], int], most: int, budget: int) -> int:
    """The largest chunk in 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that fits.

    Memory is measured for chunks of 1 and 2 and taken to grow on in a straight line; the choice is
    measured, too, and lowered until it fits.

    Args:
      memory: from a chunk to the bytes that it needs on a device; it compiles a program.
      most: largest chunk that makes sense, such as the cohort.
      budget: bytes.

    Raises:
      UserError: not even a chunk of 1 fits.
    """
    one = memory(1)
    if one > budget:
        raise UserError(
            f"a single client needs {one / 2**30:.1f} GiB of device memory, {budget / 2**30:.1f} "
            "are there: take smaller batches, a shorter longest utterance or gradient checkpointing"
        )
    if most < 2 or (two := memory(2)) > budget:
        return 1
    each = max(two - one, 1)
    fitting = min(most, 1 + (budget - one) // each)
    sizes = [size for power in range(1, 40) for size in (1 << power, 3 << (power - 1))]
    for size in sorted((size for size in sizes if size <= fitting), reverse=True):
        if size == 2 or memory(size) <= budget:
            return size
    raise AssertionError("2 is among them")


def device_budget(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that every one of the devices has for a run; None if they do not tell (a CPU).

    All processes must ask, and get the same: each can ask its own devices only.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in own]
    limits = [s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats if "bytes_limit" in s]
    least = int(SHARE * min(limits)) if limits and len(limits) == len(own) else 0
    return hosts.smallest(least) or None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of the runtime says that a device had too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)
