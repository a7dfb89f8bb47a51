"""Local copies of folders in cloud storage, and which files in them count."""

import atexit
import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fedasr.data.preparation.folder import cache_dir
from fedasr.errors import UserError
from fedasr.training.locks import LOCK_FILE, OWNER_FILE
from fedasr.training.remote.storage import PART, Storage, is_remote

# Written by orbax inside every complete checkpoint's folder; part of the name of one that is not.
STEP_MARKER, TEMPORARY_MARK = "_CHECKPOINT_METADATA", ".orbax-checkpoint-tmp"
# The folder of one checkpoint, where it may lie.
_STEP = re.compile(r"(?P<step>(?:(?:checkpoints|best)/)?(?:0|[1-9][0-9]*))/")
# Folders of a work directory from which a run goes on; others there are not its own.
_FOLDERS = ("checkpoints", "best", "local", "trackers")
_read: dict[str, tuple[dict[str, str], Path]] = {}  # by URL: what was there, and its copy


def copies_folder() -> Path:
    """Where copies lie on this machine."""
    return cache_dir() / "remote"


def local(place: str | Path) -> Path:
    """A path of what is read: of a URL that of a copy, which is kept until `refresh`.

    Raises:
      UserError: the storage cannot be read, or no copy can be made here.
    """
    if not is_remote(place):
        return Path(place)
    url = str(place).rstrip("/")
    if url not in _read:
        storage = Storage(url)
        with taken_here(url, copies_folder()):
            copies_folder().mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="read-", dir=copies_folder()))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        versions = storage.versions()
        copied(storage, folder)
        _read[url] = versions, folder
    return _read[url][1]


def refresh() -> None:
    """Forgets copies of what has changed since: what comes later reads it anew.

    Within one evaluation or run all comes from one copy, also of a run that goes on meanwhile.
    """
    for url, (versions, _) in list(_read.items()):
        now = None
        with contextlib.suppress(UserError):  # said where it is read
            now = Storage(url).versions()
        if now != versions:
            _read.pop(url, None)


def copied(
    storage: Storage, folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Copies what counts in a folder of the storage into an empty one here.

    Args:
      storage, folder: from where to where.
      wanted: whether a file is to be copied, by name.

    Returns:
      The names of all that is there and wanted.

    Raises:
      UserError: it cannot be read, or not be written here.
    """
    for _ in range(5):  # a run that goes on there removes its older checkpoints
        names = sorted(filter(wanted, storage.sizes()))
        with contextlib.suppress(FileNotFoundError), taken_here(storage.url, folder):
            storage.download(whole(names), folder)
            return names
        shutil.rmtree(folder)
        folder.mkdir()
    raise UserError(f"{storage.url} changes faster than it can be read: try again")


@contextlib.contextmanager
def taken_here(url: str, folder: Path) -> Iterator[None]:
    """Turns what this machine's disk does not do into a UserError; a file that is gone stays so."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise UserError(
            f"{url} cannot be copied to {folder} ({reason}): give FEDASR_CACHE a folder that can "
            "be written and has room for it"
        ) from error


def of_run(name: str) -> bool:
    """Whether a file in a work directory's folder may be the run's: others' are left alone.

    Such as work directories in a folder of this one, whatever they are called.
    """
    folder, inside, _ = name.partition("/")
    return not inside or folder in _FOLDERS


def whole(names: Collection[str]) -> list[str]:
    """The files that count: no locks, nothing of checkpoints that are not complete."""
    end = f"/{STEP_MARKER}"
    marked = {name.removesuffix(end) for name in names if name.endswith(end)}
    return [
        name
        for name in names
        if name not in (LOCK_FILE, OWNER_FILE)
        and TEMPORARY_MARK not in name
        and not name.endswith(PART)
        and (not step_of(name) or step_of(name) in marked)
    ]


def step_of(name: str) -> str:
    """The folder of the checkpoint that a file is of; "" for others."""
    return found["step"] if (found := _STEP.match(name)) else ""


def leftovers(names: Collection[str]) -> list[str]:
    """The files of a run that are not complete: of checkpoints, and those on their way."""
    count = set(whole(names))
    return [
        name
        for name in filter(of_run, names)
        if name not in count and (step_of(name) or name.endswith(PART))
    ]
