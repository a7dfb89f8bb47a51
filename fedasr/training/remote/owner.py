"""One process at a time in a work directory in cloud storage."""

import contextlib
import json
import threading
import time
from typing import Any

from fedasr.errors import UserError
from fedasr.training import locks
from fedasr.training.remote.storage import Storage

_SETTLED = 2.0  # seconds after which of two who write at once both see who was the last


class Owner:
    """Holds a directory as long as the context lasts: a file there that changes every few seconds.

    Who finds one knows its maker gone if that ran on this machine and is no more, or if the file
    does not change for `locks.SILENT_SECONDS`. Storage has no lock: of two that begin at once both
    write, and who wrote last has it. One taken for gone finds out before it sends anything.

    Args:
      storage: of the directory.
    """

    def __init__(self, storage: Storage):
        self._storage, self._me = storage, locks.this_process()
        self._stop = threading.Event()

    def __enter__(self) -> "Owner":
        if locks.lives(self._read):
            raise self._in_use()
        self._write(0)
        time.sleep(_SETTLED)
        if not self._is_mine():
            raise self._in_use()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        with contextlib.suppress(UserError):
            if self._is_mine():
                self._storage.remove([locks.OWNER_FILE])

    def check(self) -> None:
        """Raises UserError if another process has taken the directory."""
        if not self._is_mine():
            raise UserError(
                f"--workdir={self._storage.url} was taken over by another process, since this one "
                "had not been heard of: this one ends, and sends nothing more"
            )

    def _in_use(self) -> UserError:
        return UserError(f"--workdir={self._storage.url} is in use by another process")

    def _read(self) -> str | None:
        content = self._storage.read(locks.OWNER_FILE)
        return None if content is None else content.decode(errors="replace")

    def _is_mine(self) -> bool:
        found: Any = None
        with contextlib.suppress(ValueError):
            found = json.loads(self._read() or "")
        return isinstance(found, dict) and found.get("name") == self._me["name"]

    def _write(self, beat: int) -> None:
        content = json.dumps(self._me | {"beat": beat})
        self._storage.write(locks.OWNER_FILE, content.encode())

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(locks.BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(Exception):  # the network may be back at the next
                if not self._is_mine():
                    return
                if not self._stop.is_set():
                    self._write(beat)
