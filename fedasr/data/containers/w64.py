"""W64 (Sonic Foundry)."""

from __future__ import annotations

import struct

from fedasr.data.containers.contents import Contents, Unusable
from fedasr.data.containers.lengths import check_single, cut_short

_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
MAGICS = (_RIFF,)
_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_FORMAT = bytes.fromhex("666d7420f3acd3118cd100c04f8edb8a")
_OF_SAMPLES = (1, 3, 6, 7, 0xFFFE)  # tags of formats whose samples have a fixed size


def read(content: bytes) -> Contents:
    """A W64 file; see `examine`."""
    at, align, tag, found = 40, 0, 0, None
    while at + 24 <= len(content):
        id, size = content[at : at + 16], struct.unpack_from("<Q", content, at + 16)[0]
        there = len(content) - at
        if id == _RIFF:
            break
        if id == _FORMAT and there >= 40:
            tag = struct.unpack_from("<H", content, at + 24)[0]
            align = struct.unpack_from("<H", content, at + 36)[0]
        if id == _DATA:
            content, size = _sound(content, at, size)
            found = size - 24
        if size < 24 or size > there:
            raise Unusable("truncated: W64 ends within a chunk")
        at += size + -size % 8
    if found is None:
        raise Unusable("W64: no data in it: cut or damaged")
    if content[at:].strip(b"\0"):
        raise Unusable(f"W64: {len(content) - at} bytes after its end: several recordings?")
    return Contents((content,), found // align if align and tag in _OF_SAMPLES else None)


def _sound(content: bytes, at: int, size: int) -> tuple[bytes, int]:
    """(the file, the size of the data chunk at a place): written into it where it was unknown."""
    there = len(content) - at
    if size >= 0x7FFFFFFFFFFFFFFF or (size <= 24 < there):
        size = there
        check_single(content, at, "W64")
        mended = bytearray(content)
        struct.pack_into("<Q", mended, at + 16, size)
        struct.pack_into("<Q", mended, 16, len(content))
        content = bytes(mended)
    if size > there:
        raise cut_short("W64", there - 24, size - 24)
    return content, size
