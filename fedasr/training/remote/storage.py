"""A folder in cloud storage: its files, read, written, listed and removed, by fsspec."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedasr.errors import UserError, pass_exhaustion

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_NO_BUCKET = "specified bucket does not exist"  # of S3
PART = ".part"  # ends the name of a file on its way to a file system
_AT_ONCE = 8  # files in flight
_WAITS = (1.0, 5.0)  # seconds before another try
_PART = 1 << 23  # bytes that are compared at a time


def is_remote(place: str | Path) -> bool:
    """Whether it names a folder by a URL, such as gs://BUCKET/FOLDER, and not by a path."""
    return _REMOTE.match(str(place)) is not None


class Storage:
    """One folder in cloud storage. Names are those of files in it, such as "checkpoints/3/x".

    Args:
      url: that fsspec knows: gs://, s3://, ...

    Raises (all methods do):
      UserError: the storage does not do what it should, with its reason; or what it needs is not
        installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        if not is_remote(self.url):  # or it would be a local folder of that name
            raise UserError(f"{url} names no bucket: give one, as in gs://BUCKET/FOLDER")
        if {"", ".", ".."} & {*self.url.partition("://")[2].removeprefix("/").split("/")}:
            # What is written there is not found again, or is elsewhere.
            raise UserError(f"{url} has an empty part, or one of dots: leave it out")
        with self._told("reached"):
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            self._root = self._root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name; {} if there is no such folder."""

        return {name: int(info["size"] or 0) for name, info in self._listed().items()}

    def versions(self) -> dict[str, str]:
        """What tells whether a file is another than before, by name: its size, tag, time."""
        return {name: str(sorted(info.items(), key=str)) for name, info in self._listed().items()}

    def _listed(self) -> dict[str, Any]:
        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
            return {
                name.removeprefix(self._root).lstrip("/"): info
                for name, info in found.items()
                if info["type"] == "file" and not name.endswith("/")
            }

        try:
            found = self._tried("listed", find)
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):
                raise self._failed("listed", error) from error
            return {}
        for name in found:
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise UserError(f"{self.url} has a file {name!r}, which no folder can: remove it")
        return found

    def read(self, name: str) -> bytes | None:
        """What is in a file; None if there is none."""
        try:
            return self._tried(f"read ({name})", lambda: self._fs.cat_file(self._key(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a file, at once."""
        try:
            self._tried(f"written ({name})", lambda: self._put(name, content))
        except FileNotFoundError as error:
            raise self._failed("written", error) from error

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, in their order; one that is not there is none to remove."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._tried(
                    f"changed ({name})", lambda name=name: self._fs.rm_file(self._key(name))
                )

    def download(self, names: Iterable[str], folder: Path) -> None:
        """Copies files into a local folder, where they have the same names."""

        def copy(name: str) -> None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._tried(f"read ({name})", lambda: self._fs.get_file(self._key(name), str(path)))

        self._each(copy, names)

    def upload(self, names: Iterable[str], folder: Path) -> None:
        """Copies files from a local folder, reads each back and compares.

        Raises:
          FileNotFoundError: a local file is not there.
        """

        def copy(name: str) -> None:
            path = folder / name
            try:
                before = path.stat()
                if not self._sent(path, name) and _times(path.stat()) == _times(before):
                    raise UserError(f"{self.url}/{name} is not what was written there: try again")
                if _times(path.stat()) != _times(before):  # a log, or users' rows: as they are now
                    with tempfile.NamedTemporaryFile(dir=folder.parent) as still:
                        shutil.copyfile(path, still.name)
                        if not self._sent(Path(still.name), name):
                            raise UserError(f"{self.url}/{name} is not what was written there")
            except FileNotFoundError as error:
                if path.exists():
                    raise self._failed(f"written ({name})", error) from error
                raise

        self._each(copy, names)

    def _sent(self, path: Path, name: str) -> bool:
        """Whether what was sent is what is here."""
        self._tried(f"written ({name})", lambda: self._put_file(path, name))
        return self._tried(f"read back ({name})", lambda: self._digest(name)) == _digest_of(path)

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, name: str, content: bytes) -> None:
        with self._placed(name) as key:
            self._fs.pipe_file(key, content)

    def _put_file(self, path: Path, name: str) -> None:
        path.stat()  # whether it is the local file that is not there
        with self._placed(name) as key:
            self._fs.put_file(str(path), key)

    @contextlib.contextmanager
    def _placed(self, name: str) -> Iterator[str]:
        """Where a file is to be written, for it to be there as a whole or not at all."""
        key = self._key(name)
        if getattr(self._fs, "auto_mkdir", None) is None:  # a bucket: it has no folders
            yield key
            return
        self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        yield key + PART
        self._fs.mv(key + PART, key)

    def _digest(self, name: str) -> str:
        with self._fs.open(self._key(name), "rb") as file:
            return _digest(file)

    def _each(self, do: Any, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for done in [pool.submit(do, name) for name in names]:
                    done.result()
            except BaseException:  # each of the others might be tried as long
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _tried(self, what: str, do: Any) -> Any:
        """What `do` returns, tried again where the network may have been the reason."""
        for wait in _WAITS:
            try:
                return do()
            except (FileNotFoundError, PermissionError, UserError):
                break
            except Exception as error:
                pass_exhaustion(error, f"reaching {self.url}")
                time.sleep(wait)
        with self._told(what):
            return do()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> UserError:
        pass_exhaustion(error, f"reaching {self.url}")
        if isinstance(error, ImportError):
            ours = self.url.partition("://")[0] in ("gs", "gcs", "s3", "s3a")
            reason = "pip install 'fedasr[remote]'" + ("" if ours else f"; {error}")
        elif isinstance(error, ValueError) and "rotocol" in str(error):
            reason = "no file system is known by that name: gs:// and s3:// are"
        else:
            text = " ".join(str(error).split()) or type(error).__name__
            reason = f"{text[:200]}: mend that, and the same command goes on"
        return UserError(f"{self.url} cannot be {what}: {reason}")


def _times(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while part := file.read(_PART):
        digest.update(part)
    return digest.hexdigest()
