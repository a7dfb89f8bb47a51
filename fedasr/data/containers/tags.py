"""Tags of titles and artists, before, between and behind what is sound."""

from __future__ import annotations

import struct


def tag_size(content: bytes, at: int) -> int:
    """Bytes of the tag (ID3v2, ID3v1, APE, Lyrics3) at a place; 0 where there is none."""
    if content.startswith(b"ID3", at) and at + 10 <= len(content):
        size = 0
        for byte in content[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        return 10 + size + (10 if content[at + 5] & 0x10 else 0)
    if content.startswith(b"TAG", at) and at + 128 <= len(content):
        return 128
    if content.startswith(b"APETAGEX", at) and at + 32 <= len(content):
        size, _, flags = struct.unpack_from("<III", content, at + 12)
        return 32 + size if flags & 1 << 29 else 32
    if content.startswith(b"LYRICSBEGIN", at) and (end := content.find(b"LYRICS200", at)) > 0:
        return end + 9 - at
    return 0


def leading(content: bytes) -> int:
    """Where what is no tag begins."""
    at = 0
    while size := tag_size(content, at):
        at += size
    while content[at : at + 1] == b"\0" and content[at:].strip(b"\0"):
        at += len(content) - at - len(content[at:].lstrip(b"\0"))
    return at
