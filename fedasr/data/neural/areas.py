"""Which channels of which field of a recording are used."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedasr.errors import UserError


class Area(NamedTuple):
    """Channels start..stop-1 of a field of a day's file ("features" in a manifest's arrays)."""

    field: str
    start: int
    stop: int


# The speech motor area (6v) of the published recordings, whose decoder used these alone.
SPEECH_AREAS = (Area("tx1", 0, 128), Area("spikePow", 0, 128))


def parse_areas(text: str) -> tuple[Area, ...]:
    """Areas written as "tx1[0:128],spikePow[0:128]".

    Raises:
      UserError: it is not written so, or an area is empty.
    """
    areas = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\[(\d+):(\d+)\]\s*", part)
        if not match or int(match[2]) >= int(match[3]):
            raise UserError(f"areas {text!r}: write them as tx1[0:128],spikePow[0:128]")
        areas.append(Area(match[1], int(match[2]), int(match[3])))
    return tuple(areas)


def chosen_channels(
    parts: dict[str, np.ndarray], areas: Sequence[Area]
) -> tuple[np.ndarray | None, str]:
    """The chosen channels side by side, or what is wrong with the arrays."""
    lengths = set()
    for field, array in parts.items():
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiub":
            shape = getattr(array, "shape", None)
            return None, f"{field} is {shape}, not a matrix [time, channels] of numbers"
        lengths.add(len(array))
        stop = max(area.stop for area in areas if area.field == field)
        if array.shape[1] < stop:
            return None, f"{field} has {array.shape[1]} channels, channel {stop - 1} is wanted"
    if len(lengths) > 1:
        return None, f"the fields differ in length: {sorted(lengths)} bins"
    if lengths == {0}:
        return None, "no time bins"
    chosen = [parts[area.field][:, area.start : area.stop] for area in areas]
    return np.concatenate([part.astype(np.float32) for part in chosen], axis=1), ""
