"""One line where memory, threads or open files give out, whoever meets that first.

What fails then fails in many places at once: in threads of libraries, in finalisers, in callbacks,
each of which would print a traceback of its own. The program says it once.
"""

import _thread
import contextlib
import ctypes
import logging
import mmap
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

from fedasr.errors import REMEDIES, exhausted

_NAMES = {"memory": "out of memory", "threads": "no more threads", "open files": "no open files"}
_STDERR, _PROBE = 2, 16 << 20  # bytes
_LOOK, _PATIENCE = 2.0, 60.0  # seconds: between looks at the threads; that none takes to begin
_RESERVE: list[bytearray] = []  # given back when memory is out, so that there is some to say so
_SEEN: list[str] = []  # what gave out, elsewhere than where the program was
_KEPT: list[Any] = []  # what C calls must stay


def message(what: str, reason: object = "") -> str:
    """What is said.

    Args:
      what: of `fedasr.errors.exhausted`. reason: the error.
    """
    _RESERVE.clear()
    said = " ".join(str(reason).split())[:300]
    return (
        f"{_NAMES[what]}: {REMEDIES[what]}; what was saved is intact, and the same command goes on"
        + (f" ({said})" if said else "")
    )


def found(error: BaseException | None = None) -> str:
    """What gave out: by an error, or by one before it in another thread; "" if nothing did."""
    return exhausted(error) or next(iter(_SEEN), "")


def install() -> None:
    """Has threads, finalisers and loggers say nothing of it, and `abort` of C++ a line; once."""
    if _RESERVE:
        return
    _RESERVE.append(bytearray(1 << 20))
    _SEEN.clear()
    if _KEPT:  # hooks are in place
        return
    threading.excepthook = _hooked(threading.excepthook)
    sys.unraisablehook = _hooked(sys.unraisablehook)
    # Of libraries whose event loop could not be made, which is said where it is caught.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.raiseExceptions = False
    for logger in ("", "absl", "asyncio", "concurrent.futures", "jax"):
        logging.getLogger(logger).addFilter(_is_news)
    for handler in (logging.lastResort, *logging.getLogger().handlers):
        if handler is not None:
            handler.addFilter(_is_news)
    _catch_aborts()
    with contextlib.suppress(RuntimeError, MemoryError):
        threading.Thread(target=_watch, name="exhaustion", daemon=True).start()


def _watch() -> None:
    """Ends the program if a thread never begins, which whoever started it awaits for ever.

    So it is where memory gives out within a new thread's first lines: Python tells nobody.
    """
    looks: dict[int, int] = {}  # counted, for a clock goes on while a process is stopped
    while True:
        time.sleep(_LOOK)
        waiting = {id(frame) for frame in sys._current_frames().values() if _starts(frame)}
        looks = {frame: looks.get(frame, 0) + 1 for frame in waiting}
        if looks and max(looks.values()) * _LOOK > _PATIENCE:
            what = next(iter(_SEEN), "") or _missing() or "memory"
            _end(what, "a thread was started and never began")


def _starts(frame: FrameType | None) -> bool:
    """Whether a frame is of a wait for a thread's beginning."""
    while frame is not None:
        if frame.f_code is threading.Thread.start.__code__:
            return True
        frame = frame.f_back if frame.f_code.co_filename == threading.__file__ else None
    return False


def _hooked(before: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook of exceptions that nobody catches."""

    def hook(args: Any) -> None:
        if what := exhausted(args.exc_value):
            _SEEN.append(what)
        elif not _half_made(args):
            before(args)

    return hook


def _half_made(args: Any) -> bool:
    """Whether a finaliser misses an attribute that its object never got: what failed says so."""
    name = getattr(getattr(args, "object", None), "__name__", "")
    return name == "__del__" and isinstance(args.exc_value, AttributeError)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of a log is about anything else."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if what := exhausted(error):
        _SEEN.append(what)
    return not what


def _catch_aborts() -> None:
    """C++ ends a process that gets no memory or thread; then, and only then, a line says so."""
    _KEPT.append(None)
    if os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    # Not by Python's module: its handlers wait for the main thread, which may never come back.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
    _KEPT.append(handler)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))


def _aborted(number: int) -> None:
    """Returns if nothing seems to be missing: then the process ends as it would have."""
    del number
    if what := _missing():
        _end(what, "a library ended the process")


def _end(what: str, why: str) -> None:
    """Says it, and ends the process here and now."""
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"error: {message(what, why)}\n".encode())
    os._exit(2)


def _missing() -> str:
    """What there is none of now."""
    try:
        _thread.start_new_thread(lambda: None, ())
    except RuntimeError:
        return "threads"
    except MemoryError:
        return "memory"
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
        mmap.mmap(-1, _PROBE).close()
    except (OSError, MemoryError) as error:
        return exhausted(error) or "memory"
    return next(iter(_SEEN), "")
