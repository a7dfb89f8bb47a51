"""RIFF, RIFX and RF64: WAV."""

from __future__ import annotations

import struct
from typing import NamedTuple

from fedasr.data.containers.chunks import Chunk, chunks
from fedasr.data.containers.contents import CONVERT, Contents, Unusable
from fedasr.data.containers.lengths import check_single, cut_short, is_placeholder, with_sizes

MAGICS = (b"RIFF", b"RIFX", b"RF64", b"BW64")


_PCM_TAGS = {1: 0, 3: 0, 6: 1, 7: 1}  # tag: bytes of a sample, 0 for what the header says


class _Format(NamedTuple):
    """What a WAV's `fmt ` chunk says."""

    tag: int
    channels: int
    align: int
    bits: int


class _Sound(NamedTuple):
    """A WAV's `data` chunk; `unknown`: whether the file leaves its size open."""

    start: int
    size: int
    unknown: bool


def read(content: bytes) -> Contents:
    """A WAV file; see `examine`."""
    if content.startswith((b"RF64", b"BW64")):
        content = _rf64(content)
    order = ">" if content[:4] == b"RIFX" else "<"
    if len(content) < 12 or content[8:12] != b"WAVE":
        raise Unusable(f"a RIFF file of {content[8:12]!r}, not of sound: {CONVERT}")
    form, sound = _chunks(content, order)
    frames = _frames(form, sound.size)
    if sound.unknown:
        check_single(content, sound.start, "WAV")
        if form.align and sound.size % form.align:
            raise Unusable(
                f"truncated: WAV ends within a sample ({sound.size} bytes of {form.align} each)"
            )
        content = with_sizes(content, {4: len(content) - 8, sound.start - 4: sound.size}, order)
    return Contents((content,), frames)


def _rf64(content: bytes) -> bytes:
    """As RIFF: the 64-bit size is written where the 32-bit one is."""
    if content[8:16] != b"WAVEds64" or len(content) < 48:
        raise Unusable("WAV: RF64 without its sizes: damaged")
    long_size = struct.unpack_from("<Q", content, 28)[0]
    at = 20 + struct.unpack_from("<I", content, 16)[0]
    while content[at : at + 4] != b"data":
        if at + 8 > len(content):
            raise Unusable("WAV: no data in it: cut or damaged")
        at += 8 + (size := struct.unpack_from("<I", content, at + 4)[0]) + size % 2
    size = struct.unpack_from("<I", content, at + 4)[0]
    if size == 0xFFFFFFFF and 0 < long_size:
        size = long_size
    if size != 0xFFFFFFFF and size > len(content) - at - 8:
        raise cut_short("WAV", len(content) - at - 8, size)
    mended = bytearray(with_sizes(content, {4: len(content) - 8, at + 4: size}, "<"))
    mended[:4], mended[12:16] = b"RIFF", b"JUNK"
    return bytes(mended)


def _chunks(content: bytes, order: str) -> tuple[_Format, _Sound]:
    """The two chunks that matter."""
    form: _Format | None = None
    sound: _Sound | None = None
    for chunk in chunks(content, 12, order, "WAV"):
        if chunk.id == b"fmt " and len(content) - chunk.start >= 16:
            if form:
                raise Unusable("WAV: two formats in one file: damaged")
            form = _format(content, chunk, order)
        elif chunk.id == b"data":
            if sound is not None:
                raise Unusable("WAV: several data chunks: convert it with ffmpeg")
            sound = _Sound(chunk.start, *_size(content, chunk))
            if sound.unknown:
                break
    if sound is None or form is None:
        raise Unusable(f"WAV: no {'data' if form else 'format'} in it: cut or damaged")
    return form, sound


def _format(content: bytes, chunk: Chunk, order: str) -> _Format:
    tag, channels, rate, per_second, align, bits = struct.unpack_from(
        f"{order}HHIIHH", content, chunk.start
    )
    if tag == 0xFFFE and chunk.size >= 40 and len(content) - chunk.start >= 40:
        tag = struct.unpack_from(f"{order}H", content, chunk.start + 24)[0]
    if tag in _PCM_TAGS and per_second != rate * align:
        raise Unusable(
            f"WAV: {rate} Hz of {align} bytes are not the {per_second} bytes per second "
            "that its header says: damaged, or write it again (sox IN.wav OUT.wav)"
        )
    return _Format(tag, channels, align, bits)


def _size(content: bytes, chunk: Chunk) -> tuple[int, bool]:
    """Bytes of sound, and whether the file leaves that open."""
    there, size = len(content) - chunk.start, chunk.size
    wild = (is_placeholder(size) and size > there) or (size == 0 and _unclosed(content))
    if wild:
        size = there
    if size > there:
        raise cut_short("WAV", there, size)
    return size, wild


def _frames(form: _Format, size: int) -> int | None:
    """Samples of each channel; None for what is no PCM."""
    if form.tag not in _PCM_TAGS or not form.channels or not form.bits:
        return None
    frame = form.channels * (_PCM_TAGS[form.tag] or -(-form.bits // 8))
    if frame != form.align:
        raise Unusable(
            f"WAV: {form.channels} channels of {form.bits} bits do not fill {form.align} bytes: "
            "damaged"
        )
    return size // frame


def _unclosed(content: bytes) -> bool:
    """Whether both sizes of a WAV file were left at what they are before anything is written."""
    (riff,) = struct.unpack_from("<I", content, 4)
    return riff in (0, 8) or riff < 256 < len(content) or is_placeholder(riff)
