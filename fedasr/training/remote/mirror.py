"""A run whose work directory is in cloud storage: it works in a local copy, and sends that there.

A run renames, locks and changes files in place, which no bucket does. So what is in the bucket is
copied here when the run starts. After each checkpoint that was read back here, and at the end, what
is new or changed is copied there and read back; the file that makes a checkpoint count comes after
all others, and only then what is no longer here is removed there. So whenever the process or its
machine is gone, the bucket holds a whole checkpoint, and the same command goes on from it anywhere.
"""

import contextlib
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import jax

from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.training.locks import lock_directory
from fedasr.training.logging import say
from fedasr.training.remote.copies import (
    STEP_MARKER,
    copied,
    copies_folder,
    leftovers,
    of_run,
    step_of,
    taken_here,
    whole,
)
from fedasr.training.remote.owner import Owner
from fedasr.training.remote.storage import Storage

_HALF = (-1, -1)  # in place of what a file was, if it may not be there as a whole


class Mirror:
    """The local copy of a work directory in cloud storage.

    Args:
      url: of the work directory.
      folder: of the copy, empty.
      owner: that holds the directory, in the process that sends.

    Raises (all methods do):
      UserError: the storage cannot be read or written, or another process has taken the directory.
    """

    def __init__(self, url: str, folder: Path, owner: Owner):
        self.url, self.folder = url, folder
        self._storage, self._owner = Storage(url), owner
        self._sent: dict[str, tuple[int, int]] = {}  # what is there, as it was here
        self._lock = threading.Lock()

    def pull(self) -> None:
        """Makes the copy; removes checkpoints there that were not sent whole."""
        names = copied(self._storage, self.folder, of_run)
        self._storage.remove(leftovers(names))
        self._sent = {name: _stamp(self.folder / name) for name in whole(names)}

    def push(self) -> None:
        """Sends what is new or changed, then removes there what is no longer here."""
        with self._lock:
            self._owner.check()
            for _ in range(10):  # files may go while they are read: the best state's, for one
                with contextlib.suppress(FileNotFoundError):
                    return self._push()
                time.sleep(0.1)
            raise UserError(f"{self.folder}, the copy of {self.url}, does not keep still")

    def _push(self) -> None:
        here, there = self._here(), self._storage.sizes()
        gone = sorted(self._sent.keys() - here.keys(), key=lambda name: STEP_MARKER not in name)
        self._check_lost(gone, here)
        changed = sorted(
            name
            for name, stamp in here.items()
            if self._sent.get(name) != stamp or there.get(name) != stamp[0]
        )
        for last in (False, True):
            names = [name for name in changed if name.endswith(STEP_MARKER) == last]
            if last and names:
                self._owner.check()  # sending may have taken long
            self._sent |= dict.fromkeys(names, _HALF)  # also if sending fails midway
            self._storage.upload(names, self.folder)
            self._sent |= {name: here[name] for name in names}
        there = self._storage.sizes() if changed else there
        if lacking := [name for name in changed if name not in there]:
            raise UserError(f"{self.url} does not list {lacking[0]}, which was written there")
        if gone:
            self._owner.check()
        self._storage.remove(gone)
        for name in gone:
            del self._sent[name]

    def _check_lost(self, gone: Collection[str], here: Collection[str]) -> None:
        """Raises UserError if what is no longer here is not what a run removes."""
        if any(f"{step_of(name)}/{STEP_MARKER}" in here for name in gone):
            raise FileNotFoundError  # a checkpoint on its way out
        if not _has(self._sent, "checkpoints"):
            return  # a run that begins anew
        lost = [f for f in ("checkpoints", "best") if _has(gone, f) and not _has(here, f)]
        lost += {name for name in gone if name.startswith("local/")}
        if lost:
            raise UserError(
                f"{self.folder}, the copy of {self.url}, has lost {lost[0]}: what is there is "
                "left as it is, and the same command goes on from it"
            )

    def _here(self) -> dict[str, tuple[int, int]]:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}, the copy of {self.url}, was moved or removed")
        names = [
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        ]
        return {name: _stamp(self.folder / name) for name in whole(names)}


@contextlib.contextmanager
def mirrored(url: str, mended: Callable[[Path], bool] = lambda folder: False) -> Iterator[Mirror]:
    """A work directory in cloud storage, here as long as the context lasts.

    Of several processes the first one sends; the others read what was there when they began.

    Args:
      url: of it.
      mended: sets aside what is damaged in a copy, and says whether there was anything; called
        before other processes make theirs, which would begin with it.

    Raises:
      UserError: the storage cannot be read or written, or the directory is in use. What is not
        there yet stays in the copy.
    """
    with contextlib.ExitStack() as stack:
        owner = Owner(Storage(url))
        if hosts.is_leader():
            stack.enter_context(owner)
        folder = place_of(url)
        if folder.is_dir():  # another's of the same name, in storage elsewhere, may be at work
            lock_directory(folder).close()
        shutil.rmtree(folder.parent, ignore_errors=True)
        with taken_here(url, folder):
            folder.mkdir(parents=True)
        mirror = Mirror(url, folder, owner)
        if hosts.is_leader():
            mirror.pull()
            if jax.process_count() > 1 and mended(folder):
                mirror.push()
        hosts.wait_for_all("pulled")  # leftovers are gone
        if not hosts.is_leader():
            copied(Storage(url), folder, of_run)
        try:
            yield mirror
        except Exception as error:  # not what ends at once, such as a second Ctrl-C
            try:
                _end(mirror)
            except UserError as problem:
                say(f"warning: {problem}; what is not in {url} is in {folder}")
            if isinstance(error, UserError) and str(folder) in str(error):
                told = str(error).replace(str(folder), url)  # where it can be mended
                raise UserError(told) from error
            raise
        try:
            _end(mirror)
        except UserError as problem:
            raise UserError(f"{problem}; what is not in {url} is in {folder}") from problem


def place_of(url: str) -> Path:
    """Where the copy of a work directory lies on this machine."""
    process = "" if hosts.is_leader() else f"-{jax.process_index()}"
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", url.rstrip("/").rpartition("/")[2])
    return copies_folder() / f"{digest}{process}" / (name.lstrip(".")[-100:] or "run")


def _end(mirror: Mirror) -> None:
    if hosts.is_leader():
        with taken_here(mirror.url, mirror.folder):
            mirror.push()
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)


def _has(names: Iterable[str], folder: str) -> bool:
    """Whether there is a checkpoint among the files in a folder of a work directory."""
    return any(n.startswith(f"{folder}/") and n.endswith(f"/{STEP_MARKER}") for n in names)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
