"""Stopping between rounds when the operating system or the user asks for it."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STDERR = 2


def _say(text: bytes) -> None:
    """Writes to stderr if that takes it at once: who no longer listens must not keep us."""
    try:
        if select.select([], [_STDERR], [], 0)[1]:
            os.write(_STDERR, text)
    except (OSError, ValueError):
        pass


class StopFlag:
    """Whether a stop has been requested; a training loop looks at it between rounds."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def graceful_stop() -> Iterator[StopFlag]:
    """Turns the first SIGTERM or SIGINT inside the block into a flag.

    The second signal raises KeyboardInterrupt. The previous handlers are back in place after the
    block. Outside the main thread, where Python cannot handle signals, the flag just stays unset.

    Yields:
        The `StopFlag` that the first signal sets.
    """
    stop = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        # os.write, since a signal may arrive in the middle of a buffered write to stderr.
        name = signal.Signals(number).name
        _say(f"\n{name}: stopping after this round (again to abort)\n".encode())

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
