"""AIFF and AIFF-C (Apple/EA IFF 85)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from fedasr.data.containers.chunks import Chunk, chunks
from fedasr.data.containers.contents import CONVERT, Contents, Unusable
from fedasr.data.containers.lengths import check_single, cut_short, is_placeholder, with_sizes

MAGICS = (b"FORM",)


_BYTES = {b"NONE": 0, b"twos": 0, b"sowt": 0, b"raw ": 0, b"in24": 3, b"in32": 4}
_BYTES |= {b"fl32": 4, b"FL32": 4, b"fl64": 8, b"FL64": 8}
_BYTES |= {b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1}


class _Common(NamedTuple):
    """What an AIFF's `COMM` chunk says; `each`: bytes of a sample, 0 for a codec."""

    place: int
    channels: int
    frames: int
    each: int


class _Sound(NamedTuple):
    """An AIFF's `SSND` chunk; `before`: bytes before the first sample."""

    place: int
    size: int
    before: int
    unknown: bool  # whether the file leaves the size open


def read(content: bytes) -> Contents:
    """An AIFF or AIFF-C file; see `examine`."""
    if len(content) < 12 or content[8:12] not in (b"AIFF", b"AIFC"):
        raise Unusable(f"an IFF file of {content[8:12]!r}, not of sound: {CONVERT}")
    common, sound = _chunks(content)
    if not common.each or not common.channels:  # a codec
        if sound.unknown:
            raise Unusable(f"AIFF-C of unknown length: {CONVERT}")
        return Contents((content,))
    return _samples(content, common, sound)


def _chunks(content: bytes) -> tuple[_Common, _Sound]:
    """The two chunks that matter."""
    common: _Common | None = None
    sound: _Sound | None = None
    for chunk in chunks(content, 12, ">", "AIFF"):
        there = len(content) - chunk.start
        if chunk.id == b"COMM" and there >= 18:
            common = _common(content, chunk.start)
        elif chunk.id == b"SSND" and there >= 8:
            if sound is not None:
                raise Unusable("AIFF: several sound chunks: damaged")
            sound = _sound(content, chunk)
            if sound.unknown:
                break
    if common is None or sound is None:
        raise Unusable(f"AIFF: no {'sound' if common else 'format'} in it: cut or damaged")
    return common, sound


def _common(content: bytes, place: int) -> _Common:
    channels, frames, bits = struct.unpack_from(">HIH", content, place)
    each: int | None = 0
    if content[8:12] == b"AIFC":
        each = _BYTES.get(content[place + 18 : place + 22])
    each = -(-bits // 8) if each == 0 else each or 0
    return _Common(place, channels, frames, each)


def _sound(content: bytes, chunk: Chunk) -> _Sound:
    there, size = len(content) - chunk.start, chunk.size
    unknown = (is_placeholder(size) and size > there) or (size == 0 and there > 8)
    if unknown:
        size = there
    if size > there:
        raise cut_short("AIFF", there - 8, size - 8)
    (before,) = struct.unpack_from(">I", content, chunk.start)
    return _Sound(chunk.start, size, before, unknown)


def _samples(content: bytes, common: _Common, sound: _Sound) -> Contents:
    """Of samples of a fixed size; an unknown length is written into the file."""
    each, frames = common.channels * common.each, common.frames
    length = sound.size - 8 - sound.before
    if length < 0:
        raise Unusable("AIFF: its sound begins behind its end: cut or damaged")
    if sound.unknown:
        check_single(content, sound.place, "AIFF")
        if length % each:
            raise Unusable(f"truncated: AIFF ends within a sample ({length} bytes)")
        frames = length // each
        sizes = {4: len(content) - 8, sound.place - 4: sound.size, common.place + 2: frames}
        content = with_sizes(content, sizes, ">")
    if frames * each > length:
        raise cut_short("AIFF", length, frames * each)
    if length - frames * each >= each:
        raise Unusable(
            f"AIFF: {length} bytes of sound where its header says {frames} samples: damaged"
        )
    return Contents((content,), frames)
