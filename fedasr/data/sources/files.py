"""What sources share in reading folders and lists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedasr.data import identity
from fedasr.data.corpus import valid_split_name
from fedasr.data.utterances import Rejected
from fedasr.errors import UserError


def read_text(path: Path) -> list[tuple[int, str | None]]:
    """(number, line) of the lines of a text file that are not blank; None for one not in UTF-8.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines: list[tuple[int, str | None]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                lines.append((number, line.decode("utf-8").strip()))
            except UnicodeDecodeError:
                lines.append((number, None))
    return lines


def find_file(folder: Path, name: str) -> str:
    """The file that a name means: relative to a folder, or to one of those above it.

    Recipes write names relative to where they ran, which is mostly a folder above the data.
    """
    if not os.path.isabs(name):
        for above in (folder, *folder.parents[:4]):
            found = identity.resolved(above, name)
            if found.is_file():
                return os.fspath(found)
    return os.fspath(identity.resolved(folder, name))


def split_of(name: str) -> str | None:
    """A folder's or file's name as that of a split; None where it cannot be one."""
    name = name.replace("-", "_").replace(".", "_")
    return name if valid_split_name(name) else None


def walk(folder: Path, unvisited: dict[str, Rejected]) -> Iterator[Path]:
    """All files below a folder, sorted, links followed, hidden files left out.

    Args:
      folder: where to begin.
      unvisited: takes in, by name, what looks like input but cannot be visited: links to nothing
        ("broken_link"), folders that cannot be read ("unreadable_folder").
    """

    def below(place: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            stat = place.stat()
            names = sorted(os.listdir(place))
        except OSError as error:
            name = os.fspath(place)
            unvisited[name] = Rejected(name, "unreadable_folder", error.strerror or str(error))
            return
        here = stat.st_dev, stat.st_ino
        if here in above:  # a link to a folder that holds it
            return
        for name in names:
            path = place / name
            if name.startswith("."):
                continue
            if path.is_dir():
                yield from below(path, above | {here})
            elif path.is_file():
                yield path
            elif path.is_symlink():
                where = os.fspath(path)
                unvisited[where] = Rejected(where, "broken_link", f"to {os.readlink(path)}")

    yield from below(folder, frozenset())
