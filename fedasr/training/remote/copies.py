"""Local copies of folders in cloud storage, and which files in them count."""

import atexit
import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from fedasr.data.preparation.folder import cache_dir
from fedasr.errors import UserError
from fedasr.training.locks import LOCK_FILE, OWNER_FILE
from fedasr.training.remote.storage import Storage, is_remote

# Written by orbax inside every complete checkpoint's folder; part of the name of one that is not.
STEP_MARKER, TEMPORARY_MARK = "_CHECKPOINT_METADATA", ".orbax-checkpoint-tmp"
# The folder of one checkpoint, where it may lie.
_STEP = re.compile(r"(?P<step>(?:(?:checkpoints|best)/)?(?:0|[1-9][0-9]*))/")


def copies_folder() -> Path:
    """Where copies lie on this machine."""
    return cache_dir() / "remote"


def local(place: str | Path) -> Path:
    """A path of what is read: of a URL that of a copy, which lasts as long as the process.

    Raises:
      UserError: the storage cannot be read.
    """
    return _fetched(str(place).rstrip("/")) if is_remote(place) else Path(place)


@functools.cache
def _fetched(url: str) -> Path:
    copies_folder().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="read-", dir=copies_folder()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copied(Storage(url), folder)
    return folder


def copied(storage: Storage, folder: Path) -> list[str]:
    """Copies what counts in a folder of the storage into an empty one here.

    Returns:
      The names of all that is there.
    """
    for _ in range(5):  # a run that goes on there removes its older checkpoints
        names = sorted(storage.sizes())
        with contextlib.suppress(FileNotFoundError):
            storage.download(whole(names), folder)
            return names
        shutil.rmtree(folder)
        folder.mkdir()
    raise UserError(f"{storage.url} changes faster than it can be read: try again")


def whole(names: Collection[str]) -> list[str]:
    """The files that count: no locks, nothing of checkpoints that are not complete."""
    end = f"/{STEP_MARKER}"
    marked = {name.removesuffix(end) for name in names if name.endswith(end)}
    return [
        name
        for name in names
        if name not in (LOCK_FILE, OWNER_FILE)
        and TEMPORARY_MARK not in name
        and ((found := _STEP.match(name)) is None or found["step"] in marked)
    ]


def leftovers(names: Collection[str]) -> list[str]:
    """The files of checkpoints that are not complete."""
    count = set(whole(names))
    return [name for name in names if _STEP.match(name) and name not in count]
