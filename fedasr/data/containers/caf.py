"""CAF (Apple Core Audio)."""

from __future__ import annotations

import struct

from fedasr.data.containers.contents import Contents, Unusable
from fedasr.data.containers.lengths import check_single, cut_short, is_placeholder

MAGICS = (b"caff",)


def read(content: bytes) -> Contents:
    """A CAF file; see `examine`."""
    at, frame, found = 8, 0, None
    while at + 12 <= len(content):
        id, size = struct.unpack_from(">4sq", content, at)
        there = len(content) - at - 12
        if id == b"caff":
            break
        if id == b"desc" and there >= 32:
            packet, per_packet = struct.unpack_from(">II", content, at + 12 + 16)
            frame = packet if per_packet == 1 else 0
        if id == b"data":
            content, size = _sound(content, at, size)
            found = size - 4
        if size < 0 or size > there:
            raise Unusable("truncated: CAF ends within a chunk")
        at += 12 + size
    if found is None:
        raise Unusable("CAF: no data in it: cut or damaged")
    if content[at:].strip(b"\0"):
        raise Unusable(f"CAF: {len(content) - at} bytes after its end: several recordings?")
    return Contents((content,), found // frame if frame else None)


def _sound(content: bytes, at: int, size: int) -> tuple[bytes, int]:
    """(the file, the size of the data chunk at a place): written into it where it was unknown."""
    there = len(content) - at - 12
    if size == -1 or (is_placeholder(size & 0xFFFFFFFFFFFFFFFF) and size > there):
        size = there
        check_single(content, at, "CAF")
        mended = bytearray(content)
        struct.pack_into(">q", mended, at + 4, size)
        content = bytes(mended)
    if size > there:
        raise cut_short("CAF", there - 4, size - 4)
    return content, size
