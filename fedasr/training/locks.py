"""One process at a time in a work directory, also where the file system knows no locks."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedasr.errors import UserError

LOCK_FILE, OWNER_FILE = ".lock", ".owner"
# Of all that flock may say, the one thing that means "somebody else has it".
_CONTENTION = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
BEAT_SECONDS = 5.0
# Without a beat for so long, as this process's own clock counts, an owner elsewhere is gone.
SILENT_SECONDS = 20.0


class Lock:
    """Holds a work directory; `close` frees it, and so does the end of the process.

    Args:
        workdir: a folder.

    Attributes:
        warning: what to tell the user about the guard; "" if there is nothing to tell.

    Raises:
        UserError: if another process, or another lock of this one, holds it, or the folder cannot
            be written.
    """

    def __init__(self, workdir: str | Path) -> None:
        self._workdir = Path(workdir)
        self._owner: _Owner | None = None
        self.warning = ""
        try:
            self._file = (self._workdir / LOCK_FILE).open("w")
        except OSError as error:
            raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
        try:
            problem = _flock(self._file)
            if problem in _CONTENTION:
                raise self._in_use()
            if problem:
                self.warning = (
                    f"warning: the file system of {workdir} takes no locks "
                    f"({os.strerror(problem)}): a file {OWNER_FILE} guards the directory instead"
                )
                self._owner = _Owner(self._workdir / OWNER_FILE)
                if not self._owner.take():
                    raise self._in_use()
        except BaseException:
            self._file.close()
            raise

    def _in_use(self) -> UserError:
        return UserError(f"--workdir={self._workdir} is in use by another process")

    def close(self) -> None:
        """Frees the directory; may be called twice."""
        if self._owner is not None:
            self._owner.free()
            self._owner = None
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def lock_directory(workdir: str | Path) -> Lock:
    """Keeps other processes out of a work directory; see `Lock`."""
    return Lock(workdir)


def _flock(file: Any) -> int:
    """0, or the error number of why there is no lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        return errno.ENOSYS
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno or errno.ENOSYS
    return 0


class _Owner:
    """A file that exists while its maker lives, and changes every few seconds.

    Who finds one knows the maker dead if it ran on this host and its process is gone, or if the
    file does not change while it is watched: no clocks are compared.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._me = this_process() | {"folder": path.parent.stat().st_ino}
        self._stop = threading.Event()

    def take(self) -> bool:
        """Whether the directory is this process's now; may take `SILENT_SECONDS` to find out."""
        for _ in range(3):
            if self._make():
                threading.Thread(target=self._beat, daemon=True).start()
                return True
            if lives(lambda: _content(self._path), self._me["folder"]):
                return False
            # Of several who find it dead one gets to move it away.
            with contextlib.suppress(OSError):
                grave = self._path.with_name(f"{OWNER_FILE}.{self._me['name']}")
                self._path.rename(grave)
                grave.unlink()
        return False

    def free(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(self._path.read_text()).get("name") == self._me["name"]:
                self._path.unlink()

    def _make(self) -> bool:
        # A link to a file that is whole is made in one step, also on NFS.
        own = self._path.with_name(f"{OWNER_FILE}.{self._me['name']}")
        own.write_text(json.dumps(self._me | {"beat": 0}))
        try:
            os.link(own, self._path)
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            try:
                with self._path.open("x") as file:
                    file.write(own.read_text())
            except FileExistsError:
                return False
        finally:
            own.unlink()
        return True

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                if json.loads(self._path.read_text()).get("name") != self._me["name"]:
                    warnings.warn(f"{self._path} was taken over by another process", stacklevel=1)
                    return
                own = self._path.with_name(f"{OWNER_FILE}.{self._me['name']}")
                own.write_text(json.dumps(self._me | {"beat": beat}))
                own.replace(self._path)
            except (OSError, ValueError, AttributeError):
                continue  # a disk that is full now may have room at the next beat


def this_process() -> dict[str, Any]:
    """What an owner's file says of its maker."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "name": uuid.uuid4().hex,
    }


def lives(read: Callable[[], str | None], folder: int | None = None) -> bool:
    """Whether the maker of an owner's file seems to live; may take `SILENT_SECONDS` to find out.

    Args:
      read: gives what is in the file, None if there is none.
      folder: number of the file's folder, by which a copy is known; None where it has none.
    """
    seen = read()
    if seen is None:
        return False
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(seen)
        if owner["host"] == socket.gethostname() and owner["boot"] == _boot():
            if folder is not None and owner.get("folder") not in (None, folder):
                return False  # the copy of a folder that was in use
            return _started(owner["pid"]) == owner["started"] is not None
    until = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT_SECONDS / 4))
        if (now := read()) != seen:
            return now is not None
    return False


def _content(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _boot() -> str:
    """Names this boot of this machine, as far as it is known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(pid: int) -> str | None:
    """When a process of this machine began, as the kernel counts; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return ""
