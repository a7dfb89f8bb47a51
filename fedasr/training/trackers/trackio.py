"""Trackio; in its own local folder unless TRACKIO_SPACE_ID says otherwise (`trackio show`)."""

import os
from collections.abc import Mapping
from typing import Any

from fedasr.training.trackers.place import COUNTERS, PROJECT, Place


class _Run:
    def __init__(self, place: Place) -> None:
        import trackio

        self._trackio: Any = trackio
        self.id = place.id or f"{place.name}-{os.urandom(4).hex()}"  # runs are known by their names
        self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            config=dict(place.config),
            resume="allow",
            embed=False,
        )

    def write(self, phase: str, number: int, values: Mapping[str, float]) -> None:
        named = {f"{phase}/{name}": value for name, value in values.items()}
        self._trackio.log({COUNTERS[phase]: number, **named})

    def close(self) -> None:
        self._trackio.finish()


def open_tracker(place: Place) -> _Run:
    """See `Tracker`."""
    return _Run(place)
