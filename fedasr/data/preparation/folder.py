"""The folder that a corpus is prepared in: whose it is, who works in it, what can be kept."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedasr.data import records
from fedasr.errors import UserError
from fedasr.fields import check_local

UNFINISHED = ".unfinished"
PARTS = "parts"  # in the folder of what is unfinished
_LOCK = ".lock"


def cache_dir() -> Path:
    """Where data made on this machine is kept: $FEDASR_CACHE, or ~/.cache/fedasr."""
    return Path(os.environ.get("FEDASR_CACHE") or Path.home() / ".cache" / "fedasr")


@contextlib.contextmanager
def prepared_folder(
    out: Path, identity: str | None, overwrite: bool
) -> Iterator[dict[str, Any] | None]:
    """Locks `out`; gives the metadata of a corpus that can be used, else None and a clean folder.

    A folder is ours where it holds `corpus.json` or the mark of an unfinished preparation, which
    stands from before the first file is written until after `corpus.json` is.
    """
    mark, metadata_path = out / UNFINISHED, out / records.METADATA_FILE
    with _opened(out, mark, metadata_path) as lock:
        _lock(lock, out)
        if metadata_path.exists():
            finished = _usable(out, identity, overwrite)
            if finished is not None:
                shutil.rmtree(mark, ignore_errors=True)
                yield finished
                return
        mark.mkdir(exist_ok=True)
        # corpus.json goes first: from here on nobody takes the folder for a corpus.
        metadata_path.unlink(missing_ok=True)
        for path in out.iterdir():
            if path.name not in (_LOCK, UNFINISHED):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _keep_parts(mark, identity)
        try:
            yield None
        finally:
            if metadata_path.exists():
                shutil.rmtree(mark)
            elif identity is None:  # keep the mark, but not the disk space
                shutil.rmtree(mark / PARTS, ignore_errors=True)


def _opened(out: Path, mark: Path, metadata_path: Path) -> IO[str]:
    """The lock's file in a folder that is ours, or new."""
    check_local("out", out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another")
    foreign = sorted(p.name for p in out.iterdir() if p.name != _LOCK) if out.exists() else []
    # In this order, so that another process that is just finishing is not mistaken.
    if foreign and not mark.exists() and not metadata_path.exists():
        raise UserError(f"{out} holds other files ({foreign[0]!r}): choose an empty or new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return open(out / _LOCK, "w")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another") from error


def _keep_parts(mark: Path, identity: str | None) -> None:
    """Removes parts that another preparation left, unless it was of the same input and options."""
    path = mark / "identity"
    if identity is None or not path.is_file() or path.read_text() != identity:
        shutil.rmtree(mark / PARTS, ignore_errors=True)
        path.write_text(identity or "")


def _usable(out: Path, identity: str | None, overwrite: bool) -> dict[str, Any] | None:
    """The metadata of the finished corpus in `out` if it is the one asked for and whole."""
    try:
        metadata = records.read_metadata(out)
        same = identity is not None and metadata.get("identity") == identity
    except UserError:
        if overwrite:
            return None
        raise
    if same:
        try:
            for split in metadata["splits"]:
                records.open_corpus(out, split)
        except UserError as error:
            logging.getLogger(__name__).warning("preparing again: %s", error)
            return None
        return metadata
    if not overwrite:
        raise UserError(
            f"{out} holds another corpus ({metadata.get('name')!r}, from other data or options): "
            "choose another folder, or set overwrite to replace it"
        )
    return None


def _lock(file: IO[str], out: Path) -> None:
    """Waits until no other process prepares `out`; the system frees the lock of a dead process."""
    try:
        import fcntl
    except ImportError:  # not on Windows: preparing one folder twice at a time is not safe there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logging.getLogger(__name__).warning("waiting for another process that prepares %s", out)
        fcntl.flock(file, fcntl.LOCK_EX)
