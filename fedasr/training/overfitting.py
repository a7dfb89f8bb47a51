"""Whether training learns its examples by heart, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# A rise that is told: in so many evaluations in a row, each by so much above the lowest.
_EVALUATIONS, _RISE = 3, 0.03


class Point(NamedTuple):
    """An evaluation: units (rounds or steps) done, the mean training loss since the one before,
    and the loss on a split that does not train."""

    units: int
    training: float
    held_out: float


def rising(found: Sequence[Point]) -> tuple[Point, Point] | None:
    """The evaluation with the lowest loss and the last, where the one rises and the other falls.

    That is where in at least three evaluations in a row, up to the last, the held-out loss is 3%
    above its lowest, and the training loss below what it was then; None elsewhere.
    """
    if not found:
        return None
    lowest = min(range(len(found)), key=lambda i: found[i].held_out)
    best, later = found[lowest], found[lowest + 1 :][-_EVALUATIONS:]
    if len(later) < _EVALUATIONS:
        return None
    risen = all(point.held_out > (1 + _RISE) * best.held_out for point in later)
    fallen = all(point.training < best.training for point in later)
    return (best, later[-1]) if risen and fallen else None


def warning(found: Sequence[Point], unit: str, split: str, kept: bool) -> str:
    """What `rising` finds, for people; "" for nothing.

    Args:
      found: of `points`.
      unit: "round" or "step".
      split: of them.
      kept: whether the best state on the split is kept (`selection.split`).
    """
    pair = rising(found)
    if pair is None:
        return ""
    best, last = pair
    remedy = "take more augmentation (augment.enabled), dropout (model.options.dropout) or data"
    if not kept:
        remedy += f", or keep the best state: selection.split={split}"
    return (
        f"the loss on {split!r} has risen from {best.held_out:.3g} ({unit} {best.units}) to "
        f"{last.held_out:.3g} ({unit} {last.units}) while the training loss fell from "
        f"{best.training:.3g} to {last.training:.3g}: training users are learned by heart; {remedy}"
    )


class Watch:
    """Looks at the records of a stage one by one.

    Args:
      unit, split, kept: see `warning`.
      records: of the stage before now, of `metrics.jsonl`; those without the unit are passed over.

    Attributes:
      told: the warnings, at most one.
    """

    def __init__(
        self, unit: str, split: str, kept: bool, records: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self._unit, self._split, self._kept = unit, split, kept
        self._points: list[Point] = []
        self._losses: list[float] = []
        self.told: list[str] = []
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> str:
        """Takes a record; returns a warning the first time that there is reason for it, else ""."""
        units, loss = record.get(self._unit), _finite(record.get("loss"))
        if units is None:
            return ""
        if loss is not None:
            self._losses.append(loss)
        rates = record.get("eval") or {}
        held_out = _finite((rates.get(self._split) or {}).get("loss"))
        if held_out is None or not self._losses:
            return ""
        training = sum(self._losses) / len(self._losses)
        self._points.append(Point(units, training, held_out))
        self._losses = []
        text = warning(self._points, self._unit, self._split, self._kept)
        if not text or self.told:
            return ""
        self.told.append(text)
        return text


def _finite(value: Any) -> float | None:
    good = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if good else None
