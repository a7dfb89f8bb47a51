"""When a run is saved, and whether it can be in time."""

import statistics
import time
from collections import deque
from collections.abc import Callable

from fedasr.training.sections import Checkpoint

_WAITING = 0.05  # share of a run's time that may go by waiting for checkpoints before it is said
_WORTH_SAYING = 5.0  # seconds of it, at least


class Cadence:
    """Decides whether a checkpoint is due, and what is to be said about the time that they take.

    Args:
      settings: of the run.
      clock: seconds that never go back.
    """

    def __init__(self, settings: Checkpoint, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._deadline, self._clock = settings.every_seconds, settings.deadline, clock
        self._began = self._saved = clock()
        self._unit_began: float | None = None
        self._units: deque[float] = deque(maxlen=32)  # seconds of the last ones
        self._waited = 0.0
        self._told: set[str] = set()

    def is_old(self, busy: bool) -> bool:
        """Whether the last checkpoint is as old as one may be, and another would not be waited for.

        Args:
          busy: whether one is still being written.
        """
        return bool(self._every) and not busy and self._clock() - self._saved >= self._every

    def saved(self, waited: float) -> None:
        """Counts a checkpoint, which training has waited for so many seconds."""
        self._saved = self._clock()
        self._waited += waited

    def unit(self) -> None:
        """Counts the end of a round or step.

        The first says nothing: it compiles.
        """
        now = self._clock()
        if self._unit_began is not None:
            self._units.append(now - self._unit_began)
        self._unit_began = now

    def warnings(self, writing: float) -> list[str]:
        """What is to be said now, each thing once.

        Args:
          writing: seconds that a checkpoint takes until it is on the disk; 0 if not known.
        """
        said = {}
        # After SIGTERM a round has to end, and a checkpoint of the one before may be under way. The
        # usual round: one in which something is compiled comes once, and says nothing of a run.
        usual = statistics.median(self._units) if self._units else 0.0
        needed = max(usual, writing) + writing
        if writing and self._deadline and len(self._units) > 2 and needed > self._deadline:
            said["deadline"] = (
                f"after SIGTERM a round of {usual:.1f} s and a checkpoint of "
                f"{writing:.1f} s may take {needed:.1f} s, longer than checkpoint.deadline="
                f"{self._deadline:g} s: then only what the last checkpoint holds is kept; set "
                "checkpoint.every_seconds to lose less, or the deadline that the machine gives"
            )
        passed = self._clock() - self._began
        if writing and self._waited > max(_WORTH_SAYING, _WAITING * passed):
            said["waiting"] = (
                f"rounds have waited {self._waited:.1f} of {passed:.1f} s for checkpoints, which "
                f"take {writing:.1f} s each: set a larger checkpoint.every, or "
                "checkpoint.every_seconds, which no round waits for"
            )
        new = [f"warning: {text}" for name, text in said.items() if name not in self._told]
        self._told |= said.keys()
        return new
