"""The chunks of RIFF and IFF files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from fedasr.data.containers.contents import Unusable


class Chunk(NamedTuple):
    """What begins with four letters and a size."""

    id: bytes
    start: int  # of its content
    size: int  # as declared


def chunks(content: bytes, start: int, order: str, what: str) -> Iterator[Chunk]:
    """The chunks of a RIFF or IFF file, the last of which may be declared longer than the file."""
    at = start
    while at + 8 <= len(content):
        id, size = struct.unpack_from(f"{order}4sI", content, at)
        if not all(32 <= c < 127 for c in id) or not id.strip():
            break
        if id in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
            raise Unusable(f"{what}: several recordings in one file: split it")
        yield Chunk(id, at + 8, size)
        at += 8 + size + size % 2
    rest = content[at:]
    if rest.strip(b"\0") and not (len(rest) == 128 and rest.startswith(b"TAG")):
        raise Unusable(
            f"{what}: {len(rest)} bytes after its end that belong to no chunk: more was written "
            "than its header says, or it is damaged"
        )
