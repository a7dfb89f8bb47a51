"""FLAC (RFC 9639)."""

from __future__ import annotations

import re
from typing import NamedTuple

from fedasr.data.containers.contents import Contents, Unusable

MAGICS = (b"fLaC",)


def read(content: bytes) -> Contents:
    """A FLAC file without tags before it; see `examine`."""
    info, at = _stream_info(content)
    packed = int.from_bytes(info[10:18], "big")
    bits, total = (packed >> 36 & 31) + 1, packed & (1 << 36) - 1
    for marker in (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22"):
        if content.find(marker, at) >= 0:
            raise Unusable("FLAC: several recordings in one file: split it")
    if at == len(content) and total:
        raise Unusable(f"truncated: FLAC with 0 of {total} samples")
    rate, channels = packed >> 44, (packed >> 41 & 7) + 1
    if (first := _form(content, at)) and first != (first[0] and rate, channels):
        raise Unusable(
            f"FLAC: {rate} Hz and {channels} channels in its header, {first[0]} and {first[1]} in "
            "its first frame: damaged"
        )
    md5 = info[18:34] if any(info[18:34]) else None
    if not total:  # of a writer to a pipe; libsndfile takes it for endless
        total = _samples(content, at)
        mended = bytearray(content)
        place = content.index(info) + 10
        mended[place : place + 8] = (packed | total).to_bytes(8, "big")
        content = bytes(mended)
    return Contents((content,), total or None, md5=md5, bits=bits)


def _stream_info(content: bytes) -> tuple[bytes, int]:
    """(the STREAMINFO block, where the blocks of metadata end)."""
    at, info = 4, None
    while True:
        if at + 4 > len(content):
            raise Unusable("truncated: FLAC without its whole header")
        kind, size = content[at], int.from_bytes(content[at + 1 : at + 4], "big")
        if info is None:
            if kind & 0x7F or size != 34:
                raise Unusable("FLAC: its header is damaged")
            info = content[at + 4 : at + 38]
        at += 4 + size
        if kind & 0x80:
            break
    if len(info) < 34 or at > len(content):
        raise Unusable("truncated: FLAC without its whole header")
    return info, at


_SIZES = {1: 192, **{i: 144 << i for i in range(2, 6)}, **{i: 1 << i for i in range(8, 16)}}


def _crc8(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ (0x07 if crc & 0x80 else 0)) & 0xFF
    return crc


class _Header(NamedTuple):
    """Of a frame; `number` counts samples where `by_samples`, else frames."""

    number: int
    samples: int
    by_samples: bool


def _frame_header(content: bytes, at: int) -> _Header | None:
    """Of the frame that begins at a place; None where none does."""
    head = content[at : at + 17]
    if len(head) < 6:
        return None
    size_code, rate_code = head[2] >> 4, head[2] & 15
    if not size_code or rate_code == 15 or head[3] & 1 or head[3] >> 4 > 10:
        return None
    if (found := _coded_number(head)) is None:
        return None
    number, at_size = found
    extra = {6: 1, 7: 2}.get(size_code, 0)
    end = at_size + extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if len(head) <= end or _crc8(head[:end]) != head[end]:
        return None
    samples = _SIZES.get(size_code, 0)
    if extra:
        samples = int.from_bytes(head[at_size : at_size + extra], "big") + 1
    return _Header(number, samples, bool(head[1] & 1))


def _coded_number(head: bytes) -> tuple[int, int] | None:
    """(a frame's number, written as UTF-8 writes characters; where it ends), or None."""
    first = head[4]
    more = 0 if first < 0x80 else 7 - (first ^ 0xFF).bit_length()
    number = first if not more else first & (0x3F >> more)
    if more < 0 or (first >= 0x80 and more == 0) or len(head) < 6 + more:
        return None
    for byte in head[5 : 5 + more]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    return number, 5 + more


_RATES = {1: 88200, 2: 176400, 3: 192000, 4: 8000, 5: 16000, 6: 22050, 7: 24000, 8: 32000}
_RATES |= {9: 44100, 10: 48000, 11: 96000}


def _form(content: bytes, at: int) -> tuple[int, int] | None:
    """(rate in Hz, or 0 where only the file's header says it, channels) of a frame's header."""
    if content[at : at + 1] != b"\xff" or len(content) < at + 17:
        return None
    if _frame_header(content, at) is None:
        return None
    code, assignment = content[at + 2] & 15, content[at + 3] >> 4
    return _RATES.get(code, 0), assignment + 1 if assignment < 8 else 2


def _samples(content: bytes, start: int) -> int:
    """Samples of a FLAC stream that does not say how many it has: those of its frames."""
    total = frames = 0
    for found in re.finditer(rb"\xff[\xf8\xf9]", content[start:]):
        header = _frame_header(content, start + found.start())
        # Sound may look like a header, but hardly like the next one.
        if header and header.number == (total if header.by_samples else frames):
            total += header.samples
            frames += 1
    if not frames:
        raise Unusable("FLAC without sound: cut or damaged")
    return total
