"""What the bits of a run follow from beside its configuration, and what became another of it."""

import functools
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import fedasr
from fedasr.training.builders.devices import described

# In the order in which they are told: what a checkpoint says, and how another one is named.
_NAMES = {
    "devices": "{}",
    "cores": "{} cores",
    "chunk": "chunk={}",
    "processor": "processor {}",
    "jax": "jax {}",
    "code": "code {}",
}
NEW_ORDER = (
    "sums are in another order, so that parameters agree with those of a run that stays up to "
    "rounding (about 1e-5; adaptive optimisers carry it on), and not bit for bit"
)
NEW_CODE = "what is computed may be another, too"


@functools.cache
def source() -> str:
    """A hash of this package's source: what it computes may have changed with it."""
    folder, found = Path(fedasr.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)} ".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


@functools.cache
def processor() -> str:
    """Names the kind of CPU: code that was compiled for one need not run on another."""
    said = f"{platform.machine()} {platform.processor()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def cores() -> int:
    """Cores that XLA divides its work among on a CPU, however many devices it has there.

    Sums over parts of an array are in another order on another number: a run of one device had
    other bits from the second round on where its process was pinned to one of two cores.
    """
    if (told := os.environ.get("NPROC", "")).isdecimal():
        return int(told)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What bits follow from beside the devices; None for what has no say in them."""
    on_cpu = devices[0].platform == "cpu"
    return {
        "cores": cores() if on_cpu else None,
        "processor": processor() if on_cpu else None,
        "jax": jax.__version__,
        "code": source()[:8],
    }


def here(devices: Sequence[jax.Device], chunk: int | None) -> dict[str, Any]:
    """What a checkpoint is told of this run, to be compared by `changes`.

    Args:
      devices: of all processes.
      chunk: clients that are computed together; None where there are none.
    """
    return {"devices": described(devices), "chunk": chunk, **machine(devices)}


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What is another one here: ["2 x cpu -> 1 x cpu", ...]; [] for a run that goes on exactly.

    Args:
      theirs: metadata of a checkpoint; what it does not know (None) is taken to be the same.
      ours: of `here`.
    """
    return [
        f"{name.format(theirs[what])} -> {name.format(ours[what])}"
        for what, name in _NAMES.items()
        if theirs.get(what) is not None and ours[what] is not None and theirs[what] != ours[what]
    ]


def meaning(changes: Sequence[str]) -> str:
    """What follows for the parameters from changes, as of `changes`, also with their place."""
    return NEW_CODE if any(change.startswith("code ") for change in changes) else NEW_ORDER
