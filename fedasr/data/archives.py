"""Tar archives of recordings, read as streams and never unpacked."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedasr.errors import UserError

ARCHIVES = (".tar.gz", ".tgz", ".tar")


def is_archive(path: Path) -> bool:
    """Whether this is a file that is named like a tar archive."""
    return path.name.endswith(ARCHIVES) and path.is_file()


def archive_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of each file in a tar archive, in its order and read as a stream.

    Hidden files (such as the "._" files that macOS adds) are left out.

    Args:
      path: the archive.
      wanted: of which names to read the content; it is None for others.

    Raises:
      UserError: the archive cannot be read to its end.
    """
    opened = open if path.name.endswith(".tar") else gzip.open
    try:
        with opened(path, "rb") as raw:
            stream = _Remembering(raw)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    # Tarfile would keep a million of them, in a list that its types do not name.
                    archive.members.clear()  # type: ignore[attr-defined]
                    name = member.name
                    if member.isfile() and not os.path.basename(name).startswith("."):
                        content = archive.extractfile(member) if wanted(name) else None
                        yield name, None if content is None else content.read()
                # tarfile takes a damaged header, and the end of the file, for the archive's end.
                if stream.last != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.TarError("its end is missing, or a header is damaged")
                while rest := stream.read(1 << 20):  # gzip checks its sum at the very end
                    if rest.strip(b"\0"):
                        raise tarfile.TarError("something follows its end")
    except (OSError, EOFError, zlib.error, ValueError, tarfile.TarError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the archive {path} is damaged or incomplete ({detail})") from error


class _Remembering(io.RawIOBase):
    """A stream that knows what it gave last."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        self.last = self._stream.read(size)
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
