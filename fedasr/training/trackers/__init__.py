"""Experiment trackers of others: side channels of a run, told of each round once.

A new tracker is a module with `open_tracker(place)` and one line below. What a tracker has is kept
in `trackers/NAME.json` of the work directory, so that a resumed run, which repeats the rounds since
its last checkpoint, does not tell them again. All of them write locally unless their own
environment variables say otherwise.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedasr.errors import UserError
from fedasr.training.trackers import mlflow, trackio, wandb
from fedasr.training.trackers.place import Place, Tracker

TRACKERS: dict[str, Callable[[Place], Tracker]] = {
    "wandb": wandb.open_tracker,
    "mlflow": mlflow.open_tracker,
    "trackio": trackio.open_tracker,
}
FOLDER = "trackers"


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is unknown, or whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track={name}: there are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track={name} needs a package: pip install {name}")


class Told:
    """A tracker, and which records it has; opened when it is first told something.

    Args:
      name: of the tracker.
      workdir: of the run.
      config: of the run, plain.
    """

    def __init__(self, name: str, workdir: Path, config: Mapping[str, Any]) -> None:
        self._name, self._folder = name, workdir / FOLDER
        self._place = Place(self._folder, workdir.resolve().name, config)
        self._tracker: Tracker | None = None
        self._known: dict[str, Any] = {}

    def write(self, phase: str, number: int, values: Mapping[str, float]) -> None:
        """Tells of a round or step, unless the tracker has it.

        Raises:
          OSError, ValueError: what it has cannot be read or kept; whatever the tracker raises.
        """
        file = self._folder / f"{self._name}.json"
        if not self._known:
            self._folder.mkdir(exist_ok=True)
            self._known = {"id": "", "last": {}}
            if file.exists():
                self._known |= json.loads(file.read_text(encoding="utf-8"))
        if number <= self._known["last"].get(phase, -1):
            return
        if self._tracker is None:
            self._tracker = TRACKERS[self._name](self._place._replace(id=self._known["id"]))
            self._known["id"] = self._tracker.id
        self._tracker.write(phase, number, values)
        self._known["last"][phase] = number
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(json.dumps(self._known), encoding="utf-8")
        temporary.replace(file)

    def close(self) -> None:
        """Ends it, if it was begun."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
