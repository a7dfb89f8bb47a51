"""One line where the libraries would end one of several processes with a stack of C++.

JAX's distributed runtime calls `abort` in a thread of its own when another process has died or
cannot be reached, after many lines of log. Its own callback for that cannot be had from Python (it
ends in a `bad_cast`). So SIGABRT says what has happened, and what native code writes on stderr
passes through a thread that leaves out the end of it. Unix only; elsewhere nothing is changed.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from typing import Any

from fedasr.errors import UserError

LOST = (
    "another process of this run has ended, or cannot be reached: start the same commands again to "
    "go on from the last checkpoint"
)
_STDERR = 2
# From such a line on, what native code says is of the process's end.
_LAST_WORDS = re.compile(rb"[EF]\d{4} .*(coordination|distributed)|terminate called")
# Of errors of collectives; others are ours.
_OF_PARTNERS = re.compile(
    "gloo|nccl|coordination|heartbeat|barrier|connection|socket|peer|UNAVAILABLE|DEADLINE_EXCEEDED"
    "|ABORTED|CANCELLED",
    re.IGNORECASE,
)


class Abort:
    """What the process ends with when a library calls `abort`: a line and a status.

    Attributes:
      status: exit status; change it when the work is done, and nothing is said any more.
      message: None for nothing.
    """

    def __init__(self, status: int, message: str | None) -> None:
        self.status, self.message = status, message
        self._handler: Any = None
        self._told = _STDERR

    def install(self) -> None:
        """Has SIGABRT end the process so, and filters what native code says."""
        if os.name != "posix":
            return
        self._told = os.dup(_STDERR)
        read, write = os.pipe()
        sys.stderr.flush()
        sys.stderr = os.fdopen(self._told, "w", buffering=1, errors="backslashreplace")
        os.dup2(write, _STDERR)
        os.close(write)
        threading.Thread(target=self._relay, args=(read,), daemon=True).start()
        libc = ctypes.CDLL(None)
        # Not by Python's module: its handlers run in the main thread, which may be waiting for a
        # process that has died.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._end)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGABRT), ctypes.cast(self._handler, ctypes.c_void_p))

    def _relay(self, read: int) -> None:
        over = False
        with os.fdopen(read, "rb") as lines:
            for line in lines:
                over = over or _LAST_WORDS.match(line) is not None
                if not over:
                    with contextlib.suppress(OSError):
                        os.write(self._told, line)

    def _end(self, number: int) -> None:
        if self.message is not None:
            with contextlib.suppress(OSError):
                os.write(self._told, f"error: {self.message}\n".encode())
        os._exit(self.status)


def is_of_partners(error: BaseException) -> bool:
    """Whether an error of JAX says that another process has gone."""
    return _OF_PARTNERS.search(str(error)) is not None


def lost(error: BaseException) -> UserError:
    """What is said then."""
    said = " ".join(str(error).split())
    return UserError(f"{LOST} ({said[:150]})")
