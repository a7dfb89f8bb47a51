"""Sizes that a writer to a pipe could not go back to write: told from true ones, and mended."""

from __future__ import annotations

import re
import struct

from fedasr.data.containers.contents import CONVERT, Unusable


def is_placeholder(size: int) -> bool:
    """Whether a 32-bit size is one that writers to a pipe put where they do not know better."""
    return 0x7F000000 <= size <= 0x80000000 or size >= 0xFFFF0000


# What begins a file, to be sought in sound of unknown length.
_BEGINNINGS = re.compile(
    rb"RI(?:FF|FX)....WAVE|RF64....WAVE|FORM....AIF[FC]"
    rb"|\.snd\0\0......\0\0\0.\0...\0\0\0[\x01-\x10]"
    rb"|caff\0\x01\0\0desc|riff\x2e\x91\xcf\x11\xa5\xd6",
    re.DOTALL,
)


def check_single(content: bytes, start: int, what: str) -> None:
    """Raises where another file begins within sound that has no length."""
    if found := _BEGINNINGS.search(content, start):
        raise Unusable(
            f"{what}: several recordings in one file (another begins at byte {found.start()}): "
            "split it"
        )


def cut_short(what: str, there: int, size: int) -> Unusable:
    """To raise where `there` of `size` bytes of sound are there."""
    return Unusable(f"truncated: {what} with {there} of {size} bytes of sound")


def with_sizes(content: bytes, sizes: dict[int, int], order: str) -> bytes:
    """The file with these 32-bit sizes written at these places."""
    if max(sizes.values()) > 0xFFFFFFFF:
        raise Unusable(f"more than 4 GiB of sound of unknown length: {CONVERT}")
    mended = bytearray(content)
    for at, size in sizes.items():
        struct.pack_into(f"{order}I", mended, at, size)
    return bytes(mended)
