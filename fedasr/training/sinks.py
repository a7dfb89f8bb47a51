"""Side channels: what a run tells, which must never keep it from running.

A disk for metrics may be full, read-only, gone or hanging, and a terminal's pipe closed or stuck. A
`Sink` runs what writes to one of them in a thread of its own, waits for it no longer than a bound,
and tells of a failure once.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

_QUEUED = 1000  # calls that wait for a sink that hangs; later ones are dropped


class Sink:
    """Calls to one side channel, in order, in a thread.

    Args:
        name: of the channel, for messages.
        tell: called once, by whoever makes a call, with (name, what is wrong) of the first failure.
        patience: seconds that a caller waits for its call; 0 not to wait at all.
    """

    def __init__(self, name: str, tell: Callable[[str, str], None], patience: float = 10.0) -> None:
        self._name, self._tell, self._patience = name, tell, patience
        self._calls: queue.Queue = queue.Queue(_QUEUED)
        self._thread: threading.Thread | None = None
        self._failed: str | None = None
        self._told = self._stuck = False

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        """Has the thread call a function; never raises and never waits longer than `patience`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        done = threading.Event()
        try:
            self._calls.put_nowait((function, args, done))
        except queue.Full:
            self._fail("it does not take any more")
        else:
            if self._patience and not self._stuck and not done.wait(self._patience):
                self._fail(f"it has not answered for {self._patience:g} s")
                self._stuck = True  # nobody waits for it again before it answers
        self._report()

    def close(self, patience: float = 5.0) -> None:
        """Waits for what is under way, no longer than so many seconds."""
        if self._thread is None:
            return
        done = threading.Event()
        try:
            self._calls.put_nowait((lambda: None, (), done))
        except queue.Full:
            pass
        else:
            if not done.wait(0 if self._stuck else patience):
                self._fail("it has not answered at the end")
        self._report()

    def _work(self) -> None:
        while True:
            function, args, done = self._calls.get()
            try:
                function(*args)
            except Exception as error:
                self._fail(" ".join(f"{type(error).__name__}: {error}".split())[:200])
            finally:
                self._stuck = False
                done.set()

    def _fail(self, what: str) -> None:
        if self._failed is None:
            self._failed = what

    def _report(self) -> None:
        if self._failed is not None and not self._told:
            self._told = True
            self._tell(self._name, self._failed)
