"""Weights & Biases; offline unless WANDB_MODE says otherwise (`wandb sync` sends what there is)."""

import os
from collections.abc import Mapping
from typing import Any

from fedasr.training.trackers.place import COUNTERS, PROJECT, Place


class _Run:
    def __init__(self, place: Place) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=place.name,
            id=place.id or os.urandom(4).hex(),
            resume="allow",
            dir=str(place.folder),
            config=dict(place.config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True),
        )
        for phase, counter in COUNTERS.items():
            self._run.define_metric(counter)
            self._run.define_metric(f"{phase}/*", step_metric=counter)

    @property
    def id(self) -> str:
        return str(self._run.id)

    def write(self, phase: str, number: int, values: Mapping[str, float]) -> None:
        named = {f"{phase}/{name}": value for name, value in values.items()}
        self._run.log({COUNTERS[phase]: number, **named})

    def close(self) -> None:
        self._run.finish()


def open_tracker(place: Place) -> _Run:
    """See `Tracker`."""
    return _Run(place)
