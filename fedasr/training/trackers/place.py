"""What a tracker is, and what it is opened with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Place(NamedTuple):
    """folder: where local files go. name: of the run. config: of the run, plain.

    id: that the tracker gave the run when it was first opened; "" for a new one.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    id: str = ""


class Tracker(Protocol):
    """A run in somebody's tracker; any method may raise anything.

    Attributes:
      id: by which the same run is found again.
    """

    @property
    def id(self) -> str: ...

    def write(self, phase: str, number: int, values: Mapping[str, float]) -> None:
        """Numbers of a round ("federated") or step ("seed"), by name, such as "eval/dev/wer"."""
        ...

    def close(self) -> None: ...


PROJECT = "fedasr"
COUNTERS = {"seed": "seed/step", "federated": "federated/round"}


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
