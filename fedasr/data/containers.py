"""What an audio file holds, by its container: so that a decoder's guess is never taken for truth.

libsndfile reports as the number of samples what it guesses (MP3 without a header), repairs (WAV cut
in transfer) or finds in the first of several streams (Ogg). Here the container itself is asked:
MPEG frames are walked, chunk sizes compared with the file's, Ogg pages checked one by one. A file
is then whole, and may be handed to the decoder with its lengths written where its writer, a pipe,
could not go back to write them; or it is refused with a reason.

Formats: RIFF/RIFX/RF64 (WAV), AIFF and AIFF-C (Apple/EA IFF 85), AU, CAF, W64, NIST SPHERE, FLAC
(RFC 9639), Ogg (RFC 3533) with Vorbis, Opus (RFC 7845) or FLAC, MPEG 1/2/2.5 audio (ISO 11172-3).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_TEXT_SHOWN = 24


class Unusable(ValueError):
    """The file is cut, damaged, ambiguous, or of a format that cannot be read; says which."""


@dataclass(frozen=True)
class Contents:
    """A file that is whole.

    Attributes:
      parts: what to decode, one after the other; mended where sizes were unknown.
      frames: samples of each channel in all, or None where the container does not say.
      seconds: the same in seconds, for codecs whose decoders choose the rate; or None.
      slack: how many samples the decoder may differ from `frames`.
      md5: of the samples (FLAC), or None; bits: of a sample, with it.
      mpeg: whether libmpg123 decodes it.
    """

    parts: tuple[bytes, ...]
    frames: int | None = None
    seconds: float | None = None
    slack: int = 0
    md5: bytes | None = None
    bits: int = 0
    mpeg: bool = False


def examine(content: bytes) -> Contents:
    """Says what a file holds.

    Args:
      content: all of the file.

    Raises:
      Unusable: it is empty, cut, damaged, holds several recordings where its format knows only
        one, or is of another format; the message names the format and a remedy.
    """
    if not content:
        raise Unusable("the file is empty")
    content = bytes(content)
    for magic, offset, reader in _READERS:
        if content.startswith(magic, offset):
            return reader(content)
    start = _leading(content)
    if content.startswith(b"fLaC", start):
        return _flac(content[start:])
    if (header := _mpeg_header(content, start)) and not _is_adts(content, start):
        return _mpeg(content, start, header)
    raise Unusable(_what_else(content, start))


# ------------------------------------------------------------------------------- not for libsndfile

_CONVERT = "convert it, for example: ffmpeg -i IN OUT.flac"


def _what_else(content: bytes, start: int) -> str:
    """One line on a file that cannot be read."""
    head = content[:256].lstrip().lower()
    if content[4:8] == b"ftyp":
        return f"AAC or ALAC in an MP4 file, which libsndfile does not read: {_CONVERT}"
    if _is_adts(content, start):
        return f"AAC (ADTS), which libsndfile does not read: {_CONVERT}"
    for magic, name in (
        (b"\x1a\x45\xdf\xa3", "Matroska or WebM"),
        (b"#!AMR", "AMR"),
        (b"\x30\x26\xb2\x75", "WMA"),
        (b"MThd", "MIDI"),
        (b"MAC ", "Monkey's Audio"),
        (b"wvpk", "WavPack"),
        (b"ajkg", "Shorten"),
        (b".RMF", "RealAudio"),
        (b"FLV", "Flash video"),
        (b"Creative Voice File", "VOC"),
    ):
        if content.startswith(magic):
            return f"{name}, which is not read: {_CONVERT}"
    for magic, name in ((b"PK\x03\x04", "ZIP"), (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2")):
        if content.startswith(magic):
            return f"a {name} archive, not a recording: unpack it"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the recording itself: git lfs pull"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        return "text (a web page or an error message?), not a recording: download it again"
    if not content.strip(b"\0"):
        return "nothing but zero bytes: copy or download it again"
    shown = content[:_TEXT_SHOWN]
    return f"no format that is read (it begins with {shown!r}): {_CONVERT}"


def _is_adts(content: bytes, start: int) -> bool:
    return (
        len(content) > start + 7
        and content[start] == 0xFF
        and content[start + 1] & 0xF6 == 0xF0  # sync, layer 0: MPEG audio knows no such layer
    )


# ------------------------------------------------------------------------------------- RIFF: WAV

_PCM_TAGS = {1: 0, 3: 0, 6: 1, 7: 1}  # tag: bytes of a sample, 0 for what the header says


def _is_placeholder(size: int) -> bool:
    """Whether a 32-bit size is one that writers to a pipe put where they do not know better."""
    return 0x7F000000 <= size <= 0x80000000 or size >= 0xFFFF0000


class _Chunk(NamedTuple):
    id: bytes
    start: int  # of its content
    size: int  # as declared


def _chunks(content: bytes, start: int, order: str, what: str) -> Iterator[_Chunk]:
    """The chunks of a RIFF or IFF file, the last of which may be declared longer than the file."""
    at = start
    while at + 8 <= len(content):
        id, size = struct.unpack_from(f"{order}4sI", content, at)
        if not all(32 <= c < 127 for c in id) or not id.strip():
            break
        if id in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
            raise Unusable(f"{what}: several recordings in one file: split it")
        yield _Chunk(id, at + 8, size)
        at += 8 + size + size % 2
    rest = content[at:]
    if rest.strip(b"\0") and not (len(rest) == 128 and rest.startswith(b"TAG")):
        raise Unusable(
            f"{what}: {len(rest)} bytes after its end that belong to no chunk: more was written "
            "than its header says, or it is damaged"
        )


def _rf64(content: bytes) -> Contents:
    """As RIFF: a 64-bit size is written where the 32-bit one is."""
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
        raise _cut("WAV", len(content) - at - 8, size)
    mended = bytearray(_with(content, {4: len(content) - 8, at + 4: size}, "<"))
    mended[:4], mended[12:16] = b"RIFF", b"JUNK"
    return _wav(bytes(mended))


class _WavFormat(NamedTuple):
    """What a WAV's `fmt ` chunk says."""

    tag: int
    channels: int
    align: int
    bits: int


def _wav(content: bytes) -> Contents:
    order = ">" if content[:4] == b"RIFX" else "<"
    form: _WavFormat | None = None
    sound: tuple[int, int, bool] | None = None  # its place, size, whether that was unknown
    if len(content) < 12 or content[8:12] != b"WAVE":
        raise Unusable(f"a RIFF file of {content[8:12]!r}, not of sound: {_CONVERT}")
    for chunk in _chunks(content, 12, order, "WAV"):
        if chunk.id == b"fmt " and len(content) - chunk.start >= 16:
            if form:
                raise Unusable("WAV: two formats in one file: damaged")
            form = _wav_format(content, chunk, order)
        elif chunk.id == b"data":
            if sound is not None:
                raise Unusable("WAV: several data chunks: convert it with ffmpeg")
            sound = chunk.start, *_wav_size(content, chunk)
            if sound[2]:
                break
    if sound is None or form is None:
        raise Unusable(f"WAV: no {'data' if form else 'format'} in it: cut or damaged")
    start, size, wild = sound
    frames = _wav_frames(form, size)
    if wild:
        _check_single(content, start, "WAV")
        if form.align and size % form.align:
            raise Unusable(
                f"truncated: WAV ends within a sample ({size} bytes of {form.align} each)"
            )
        content = _with(content, {4: len(content) - 8, start - 4: size}, order)
    return Contents((content,), frames)


def _wav_format(content: bytes, chunk: _Chunk, order: str) -> _WavFormat:
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
    return _WavFormat(tag, channels, align, bits)


def _wav_size(content: bytes, chunk: _Chunk) -> tuple[int, bool]:
    """Bytes of sound, and whether the file leaves that open."""
    there, size = len(content) - chunk.start, chunk.size
    wild = (_is_placeholder(size) and size > there) or (size == 0 and _unclosed(content))
    if wild:
        size = there
    if size > there:
        raise _cut("WAV", there, size)
    return size, wild


def _wav_frames(form: _WavFormat, size: int) -> int | None:
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
    return riff in (0, 8) or riff < 256 < len(content) or _is_placeholder(riff)


# What begins a file, to be sought in sound of unknown length.
_BEGINNINGS = re.compile(
    rb"RI(?:FF|FX)....WAVE|RF64....WAVE|FORM....AIF[FC]"
    rb"|\.snd\0\0......\0\0\0.\0...\0\0\0[\x01-\x10]"
    rb"|caff\0\x01\0\0desc|riff\x2e\x91\xcf\x11\xa5\xd6",
    re.DOTALL,
)


def _check_single(content: bytes, start: int, what: str) -> None:
    """Raises where another file begins within sound that has no length."""
    if found := _BEGINNINGS.search(content, start):
        raise Unusable(
            f"{what}: several recordings in one file (another begins at byte {found.start()}): "
            "split it"
        )


def _cut(what: str, there: int, size: int) -> Unusable:
    return Unusable(f"truncated: {what} with {there} of {size} bytes of sound")


def _with(content: bytes, sizes: dict[int, int], order: str) -> bytes:
    """The file with these 32-bit sizes written at these places."""
    if max(sizes.values()) > 0xFFFFFFFF:
        raise Unusable(f"more than 4 GiB of sound of unknown length: {_CONVERT}")
    mended = bytearray(content)
    for at, size in sizes.items():
        struct.pack_into(f"{order}I", mended, at, size)
    return bytes(mended)


# ------------------------------------------------------------------------------------------ AIFF

_AIFC_BYTES = {b"NONE": 0, b"twos": 0, b"sowt": 0, b"raw ": 0, b"in24": 3, b"in32": 4}
_AIFC_BYTES |= {b"fl32": 4, b"FL32": 4, b"fl64": 8, b"FL64": 8}
_AIFC_BYTES |= {b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1}


class _AiffCommon(NamedTuple):
    """What an AIFF's `COMM` chunk says; `each`: bytes of a sample, 0 for a codec."""

    place: int
    channels: int
    frames: int
    each: int


class _AiffSound(NamedTuple):
    """An AIFF's `SSND` chunk; `before`: bytes before the first sample."""

    place: int
    size: int
    before: int
    unknown: bool  # whether the file leaves the size open


def _aiff(content: bytes) -> Contents:
    if len(content) < 12 or content[8:12] not in (b"AIFF", b"AIFC"):
        raise Unusable(f"an IFF file of {content[8:12]!r}, not of sound: {_CONVERT}")
    common: _AiffCommon | None = None
    sound: _AiffSound | None = None
    for chunk in _chunks(content, 12, ">", "AIFF"):
        there = len(content) - chunk.start
        if chunk.id == b"COMM" and there >= 18:
            common = _aiff_common(content, chunk.start)
        elif chunk.id == b"SSND" and there >= 8:
            if sound is not None:
                raise Unusable("AIFF: several sound chunks: damaged")
            sound = _aiff_sound(content, chunk)
            if sound.unknown:
                break
    if common is None or sound is None:
        raise Unusable(f"AIFF: no {'sound' if common else 'format'} in it: cut or damaged")
    if not common.each or not common.channels:  # a codec
        if sound.unknown:
            raise Unusable(f"AIFF-C of unknown length: {_CONVERT}")
        return Contents((content,))
    return _aiff_samples(content, common, sound)


def _aiff_common(content: bytes, place: int) -> _AiffCommon:
    channels, frames, bits = struct.unpack_from(">HIH", content, place)
    each: int | None = 0
    if content[8:12] == b"AIFC":
        each = _AIFC_BYTES.get(content[place + 18 : place + 22])
    each = -(-bits // 8) if each == 0 else each or 0
    return _AiffCommon(place, channels, frames, each)


def _aiff_sound(content: bytes, chunk: _Chunk) -> _AiffSound:
    there, size = len(content) - chunk.start, chunk.size
    unknown = (_is_placeholder(size) and size > there) or (size == 0 and there > 8)
    if unknown:
        size = there
    if size > there:
        raise _cut("AIFF", there - 8, size - 8)
    (before,) = struct.unpack_from(">I", content, chunk.start)
    return _AiffSound(chunk.start, size, before, unknown)


def _aiff_samples(content: bytes, common: _AiffCommon, sound: _AiffSound) -> Contents:
    """Of samples of a fixed size; an unknown length is written into the file."""
    each, frames = common.channels * common.each, common.frames
    length = sound.size - 8 - sound.before
    if sound.unknown:
        _check_single(content, sound.place, "AIFF")
        if length % each:
            raise Unusable(f"truncated: AIFF ends within a sample ({length} bytes)")
        frames = length // each
        sizes = {4: len(content) - 8, sound.place - 4: sound.size, common.place + 2: frames}
        content = _with(content, sizes, ">")
    if frames * each > length:
        raise _cut("AIFF", length, frames * each)
    if length - frames * each >= each:
        raise Unusable(
            f"AIFF: {length} bytes of sound where its header says {frames} samples: damaged"
        )
    return Contents((content,), frames)


# ---------------------------------------------------------------------------- AU, CAF, W64, SPHERE

_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}


def _au(content: bytes) -> Contents:
    order = ">" if content[:4] == b".snd" else "<"
    if len(content) < 24:
        raise Unusable("truncated: AU without its whole header")
    start, size, encoding, _, channels = struct.unpack_from(f"{order}IIIII", content, 4)
    there = len(content) - start
    if there < 0:
        raise Unusable("truncated: AU without its sound")
    if unknown := size == 0xFFFFFFFF or (_is_placeholder(size) and size > there):
        size = there
    if size > there:
        raise _cut("AU", there, size)
    rest = content[start + size :]
    if rest.startswith((b".snd", b"dns.")):
        raise Unusable("AU: several recordings in one file: split it")
    if rest.strip(b"\0") or len(rest) > 8:
        raise Unusable(f"AU: {len(rest)} bytes more than its header says: damaged, or not closed")
    each = _AU_BYTES.get(encoding, 0) * channels
    if unknown:
        _check_single(content, start, "AU")
    if each and size % each:
        raise Unusable(f"truncated: AU ends within a sample ({size} bytes of {each} each)")
    if unknown:
        content = _with(content, {8: size}, order)
    return Contents((content,), size // each if each else None)


def _caf(content: bytes) -> Contents:
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
            if size == -1 or (_is_placeholder(size & 0xFFFFFFFFFFFFFFFF) and size > there):
                size = there
                _check_single(content, at, "CAF")
                mended = bytearray(content)
                struct.pack_into(">q", mended, at + 4, size)
                content = bytes(mended)
            if size > there:
                raise _cut("CAF", there - 4, size - 4)
            found = size - 4
        if size < 0 or size > there:
            raise Unusable("truncated: CAF ends within a chunk")
        at += 12 + size
    if found is None:
        raise Unusable("CAF: no data in it: cut or damaged")
    if content[at:].strip(b"\0"):
        raise Unusable(f"CAF: {len(content) - at} bytes after its end: several recordings?")
    return Contents((content,), found // frame if frame else None)


_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_W64_FORMAT = bytes.fromhex("666d7420f3acd3118cd100c04f8edb8a")


def _w64(content: bytes) -> Contents:
    at, align, tag, found = 40, 0, 0, None
    while at + 24 <= len(content):
        id, size = content[at : at + 16], struct.unpack_from("<Q", content, at + 16)[0]
        there = len(content) - at
        if id == _W64_RIFF:
            break
        if id == _W64_FORMAT and there >= 40:
            tag = struct.unpack_from("<H", content, at + 24)[0]
            align = struct.unpack_from("<H", content, at + 36)[0]
        if id == _W64_DATA:
            if size >= 0x7FFFFFFFFFFFFFFF or (size <= 24 < there):
                size = there
                _check_single(content, at, "W64")
                mended = bytearray(content)
                struct.pack_into("<Q", mended, at + 16, size)
                struct.pack_into("<Q", mended, 16, len(content))
                content = bytes(mended)
            if size > there:
                raise _cut("W64", there - 24, size - 24)
            found = size - 24
        if size < 24 or size > there:
            raise Unusable("truncated: W64 ends within a chunk")
        at += size + -size % 8
    if found is None:
        raise Unusable("W64: no data in it: cut or damaged")
    if content[at:].strip(b"\0"):
        raise Unusable(f"W64: {len(content) - at} bytes after its end: several recordings?")
    return Contents((content,), found // align if align and tag in (1, 3, 6, 7, 0xFFFE) else None)


def _sphere(content: bytes) -> Contents:
    try:
        length = int(content[8:16])
        text = content[16:length].decode("ascii").split("end_head")[0]
        lines = [line.split(maxsplit=2) for line in text.splitlines() if line.strip()]
        fields = {name: value for name, _, value in lines}
        channels = int(fields.get("channel_count", 1))
        coding = fields.get("sample_coding", "pcm").strip()
        each = int(fields.get("sample_n_bytes", 2)) * channels
        frames = int(fields["sample_count"]) if "sample_count" in fields else None
    except (ValueError, UnicodeDecodeError) as error:
        raise Unusable(f"SPHERE: its header is damaged ({error})") from error
    if "," in coding or coding not in ("pcm", "ulaw", "alaw", "mu-law", "a-law"):
        raise Unusable(f"SPHERE with {coding}, which is not read: convert it with sph2pipe -f wav")
    if each < 1:
        raise Unusable("SPHERE: its header is damaged (no bytes in a sample)")
    there = len(content) - length
    if frames is None:
        frames = there // each
    if frames * each > there:
        raise _cut("SPHERE", max(0, there), frames * each)
    rest = content[length + frames * each :]
    if rest.strip(b"\0"):
        raise Unusable(f"SPHERE: {len(rest)} bytes more than its header says: damaged")
    return Contents((content,), frames)


# ------------------------------------------------------------------------------------------ FLAC


def _flac(content: bytes) -> Contents:
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
    packed = int.from_bytes(info[10:18], "big")
    bits, total = (packed >> 36 & 31) + 1, packed & (1 << 36) - 1
    for marker in (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22"):
        if content.find(marker, at) >= 0:
            raise Unusable("FLAC: several recordings in one file: split it")
    if at == len(content) and total:
        raise Unusable(f"truncated: FLAC with 0 of {total} samples")
    rate, channels = packed >> 44, (packed >> 41 & 7) + 1
    if (first := _flac_form(content, at)) and first != (first[0] and rate, channels):
        raise Unusable(
            f"FLAC: {rate} Hz and {channels} channels in its header, {first[0]} and {first[1]} in "
            "its first frame: damaged"
        )
    md5 = info[18:34] if any(info[18:34]) else None
    if not total:  # of a writer to a pipe; libsndfile takes it for endless
        total = _flac_samples(content, at)
        mended = bytearray(content)
        place = content.index(info) + 10
        mended[place : place + 8] = (packed | total).to_bytes(8, "big")
        content = bytes(mended)
    return Contents((content,), total or None, md5=md5, bits=bits)


_FLAC_SIZES = {1: 192, **{i: 144 << i for i in range(2, 6)}, **{i: 1 << i for i in range(8, 16)}}


def _crc8(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ (0x07 if crc & 0x80 else 0)) & 0xFF
    return crc


def _flac_header(content: bytes, at: int) -> tuple[int, int, bool] | None:
    """(number, samples, whether the number counts samples) of the frame that begins at a place."""
    head = content[at : at + 17]
    if len(head) < 6:
        return None
    size_code, rate_code = head[2] >> 4, head[2] & 15
    if not size_code or rate_code == 15 or head[3] & 1 or head[3] >> 4 > 10:
        return None
    first = head[4]
    more = 0 if first < 0x80 else 7 - (first ^ 0xFF).bit_length()
    number = first if not more else first & (0x3F >> more)
    if more < 0 or (first >= 0x80 and more == 0) or len(head) < 6 + more:
        return None
    for byte in head[5 : 5 + more]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    at_size = 5 + more
    extra = {6: 1, 7: 2}.get(size_code, 0)
    end = at_size + extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if len(head) <= end or _crc8(head[:end]) != head[end]:
        return None
    samples = _FLAC_SIZES.get(size_code, 0)
    if extra:
        samples = int.from_bytes(head[at_size : at_size + extra], "big") + 1
    return number, samples, bool(head[1] & 1)


_FLAC_RATES = {1: 88200, 2: 176400, 3: 192000, 4: 8000, 5: 16000, 6: 22050, 7: 24000, 8: 32000}
_FLAC_RATES |= {9: 44100, 10: 48000, 11: 96000}


def _flac_form(content: bytes, at: int) -> tuple[int, int] | None:
    """(rate in Hz, or 0 where only the file's header says it, channels) of a frame's header."""
    if content[at : at + 1] != b"\xff" or len(content) < at + 17:
        return None
    if _flac_header(content, at) is None:
        return None
    code, assignment = content[at + 2] & 15, content[at + 3] >> 4
    return _FLAC_RATES.get(code, 0), assignment + 1 if assignment < 8 else 2


def _flac_samples(content: bytes, start: int) -> int:
    """Samples of a FLAC stream that does not say how many it has: those of its frames."""
    total = frames = 0
    for found in re.finditer(rb"\xff[\xf8\xf9]", content[start:]):
        header = _flac_header(content, start + found.start())
        # Sound may look like a header, but hardly like the next one.
        if header and header[0] == (total if header[2] else frames):
            total += header[1]
            frames += 1
    if not frames:
        raise Unusable("FLAC without sound: cut or damaged")
    return total


# ------------------------------------------------------------------------------------------- Ogg

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """CRC-32 of RFC 3533 (0x04c11db7, not reflected, from 0), by the reflected one of zlib."""
    value = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


@dataclass
class _Link:
    """One logical stream: where it begins and ends, and what its first page says."""

    serial: int
    start: int
    head: bytes
    next: int = 1
    granule: int = 0
    stop: int = 0  # 0: no end of stream seen yet


class _Page(NamedTuple):
    """An Ogg page; `stop`: where the next begins."""

    flags: int
    granule: int
    serial: int
    number: int
    body: bytes
    stop: int


def _ogg(content: bytes) -> Contents:
    links: list[_Link] = []
    at = 0
    while at < len(content):
        page = _ogg_page(content, at)
        _take_page(links, page, at)
        at = page.stop
    if not links[-1].stop:
        raise _no_end(links[-1])
    seconds = [_ogg_seconds(link) for link in links]
    parts = tuple(content[link.start : link.stop] for link in links)
    known = [s for s in seconds if s is not None]
    return Contents(parts, seconds=sum(known) if len(known) == len(links) else None)


def _ogg_page(content: bytes, at: int) -> _Page:
    """The page that begins there, whole and as its checksum says."""
    if len(content) < at + 27 or len(content) < at + 27 + content[at + 26]:
        raise Unusable("truncated: Ogg ends within a page")
    if content[at : at + 5] != b"OggS\0":
        raise Unusable(f"Ogg: what stands at byte {at} is no page: damaged")
    granule, serial, number, crc = struct.unpack_from("<qIII", content, at + 6)
    segments = content[at + 27 : at + 27 + content[at + 26]]
    body = at + 27 + len(segments)
    end = body + sum(segments)
    if end > len(content):
        raise Unusable("truncated: Ogg ends within a page")
    if _ogg_crc(content[at : at + 22] + bytes(4) + content[at + 26 : end]) != crc:
        raise Unusable(f"Ogg: the page at byte {at} does not agree with its checksum: damaged")
    return _Page(content[at + 5], granule, serial, number, content[body:end], end)


def _take_page(links: list[_Link], page: _Page, at: int) -> None:
    """Adds the page at a place to the links of a chain of streams."""
    open_link = links[-1] if links and not links[-1].stop else None
    if page.flags & 2:
        if open_link is not None:
            # Streams side by side begin before any of them has a second page.
            if open_link.next == 1:
                raise Unusable(f"Ogg with several streams at a time: {_CONVERT}")
            raise _no_end(open_link)
        links.append(_Link(page.serial, at, page.body))
    elif open_link is None or page.serial != open_link.serial:
        raise Unusable("Ogg: a page of a stream that never began: damaged")
    else:
        if page.number != open_link.next:
            raise Unusable(f"Ogg: page {open_link.next} is missing: damaged")
        open_link.next += 1
    if page.granule >= 0:
        links[-1].granule = page.granule
    if page.flags & 4:
        links[-1].stop = page.stop


def _no_end(link: _Link) -> Unusable:
    return Unusable(
        f"truncated: Ogg without the end of its stream (after {link.granule} samples): its end is "
        "missing, or it was not closed"
    )


def _ogg_seconds(link: _Link) -> float | None:
    head = link.head
    if head.startswith(b"\x01vorbis") and len(head) >= 16:
        rate = struct.unpack_from("<I", head, 12)[0]
        return link.granule / rate if rate else None
    if head.startswith(b"OpusHead") and len(head) >= 12:
        return max(0, link.granule - struct.unpack_from("<H", head, 10)[0]) / 48000
    if head.startswith(b"\x7fFLAC"):
        raise Unusable(f"FLAC in Ogg, which libsndfile does not read: {_CONVERT}")
    if head.startswith(b"Speex"):
        raise Unusable(f"Speex, which is not read: {_CONVERT}")
    raise Unusable(f"Ogg with no sound that is read ({head[:8]!r}): {_CONVERT}")


# ------------------------------------------------------------------------------------ MPEG audio

_RATES: tuple[tuple[int, ...], ...] = (
    (11025, 12000, 8000),
    (),
    (22050, 24000, 16000),
    (44100, 48000, 32000),
)
_KBPS = {  # by (version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class _Header(NamedTuple):
    """Of an MPEG frame; `kind` is what may not change within a recording."""

    kind: tuple[int, int, int, bool]  # version bits, layer, rate, mono
    size: int  # bytes of the frame
    samples: int
    side: int  # bytes from the frame's start to where an encoder's own header would stand


def _mpeg_header(content: bytes, at: int) -> _Header | None:
    if at + 4 > len(content) or content[at] != 0xFF or content[at + 1] & 0xE0 != 0xE0:
        return None
    second, third, fourth = content[at + 1 : at + 4]
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    index, rate_index = third >> 4, third >> 2 & 3
    if version == 1 or layer == 4 or rate_index == 3 or index in (0, 15):
        return None
    rate = _RATES[version][rate_index]
    first, mono = version == 3, fourth >> 6 == 3
    bits = _KBPS[first, layer][index - 1] * 1000
    padding = third >> 1 & 1
    if layer == 1:
        size, samples = (12 * bits // rate + padding) * 4, 384
    else:
        samples = 1152 if first or layer == 2 else 576
        size = samples // 8 * bits // rate + padding
    side = 4 + ((17 if mono else 32) if first else (9 if mono else 17))
    return _Header((version, layer, rate, mono), size, samples, side)


def _declared(content: bytes, at: int, header: _Header) -> int | None:
    """The frames that an encoder's own header (Xing, Info, VBRI) counts; None: no such frame."""
    if header.kind[1] != 3:
        return None
    # Some writers put it after where a checksum would be, others do not count the checksum.
    for side in (header.side, header.side + 2):
        if content[at + side : at + side + 4] in (b"Xing", b"Info"):
            flags = int.from_bytes(content[at + side + 4 : at + side + 8], "big")
            if not flags & 1:
                return 0
            return int.from_bytes(content[at + side + 8 : at + side + 12], "big")
    if content[at + 36 : at + 40] == b"VBRI":
        return int.from_bytes(content[at + 50 : at + 54], "big")
    return None


def _tag_size(content: bytes, at: int) -> int:
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


def _leading(content: bytes) -> int:
    """Where what is no tag begins."""
    at = 0
    while size := _tag_size(content, at):
        at += size
    while content[at : at + 1] == b"\0" and content[at:].strip(b"\0"):
        at += len(content) - at - len(content[at:].lstrip(b"\0"))
    return at


def _mpeg(content: bytes, start: int, first: _Header) -> Contents:
    layer = first.kind[1]
    what = "MP3" if layer == 3 else f"MPEG layer {layer}"
    at = start
    frames: list[tuple[int, int]] = []
    declared: list[int] = []
    while at < len(content):
        header = _mpeg_header(content, at)
        if header is None:
            if size := _tag_size(content, at):
                at += size
                continue
            if not (rest := content[at:]).strip(b"\0"):
                break
            if len(rest) < 4 and rest[:1] == b"\xff":
                raise Unusable(f"truncated: {what} ends within a frame")
            raise Unusable(
                f"{what}: what stands at byte {at} is no frame (after {len(frames)} of them): "
                f"damaged, or {_what_else(rest, 0)}"
            )
        if header.kind != first.kind:
            raise Unusable(
                f"{what}: its rate or its channels change at byte {at}: several recordings in one "
                "file, or damaged"
            )
        if at + header.size > len(content):
            raise Unusable(f"truncated: {what} ends within a frame")
        count = _declared(content, at, header)
        if count is None:
            frames.append((at, header.size))
        else:
            declared.append(count)
        at += header.size
    if not frames:
        raise Unusable(f"{what} without sound: cut or damaged")
    if len(declared) == 1 and declared[0] > len(frames) + 1:
        raise Unusable(f"truncated: {what} with {len(frames)} of {declared[0]} frames")
    if len(declared) == 1 and abs(declared[0] - len(frames)) <= 1:
        # What the encoder padded is known to the decoder: a frame or two less.
        return Contents((content,), len(frames) * first.samples, slack=4 * first.samples, mpeg=True)
    sound = len(frames) * first.samples
    if layer != 3:
        return Contents((content,), sound, slack=first.samples, mpeg=True)
    body = b"".join(content[at : at + size] for at, size in frames)
    head = _info_frame(content[frames[0][0] : frames[0][0] + 4], len(frames))
    return Contents((head + body,), sound, slack=2 * first.samples, mpeg=True)


def _info_frame(header: bytes, frames: int) -> bytes:
    """The frame without sound that tells a decoder how many frames follow."""
    # No checksum, no padding, and a bit rate at which the frame is long enough.
    head = bytes((header[0], header[1] | 1, (header[2] & 0x0D) | 0x90, header[3]))
    parsed = _mpeg_header(head, 0)
    assert parsed is not None  # it is made from one that was read
    frame = bytearray(parsed.size)
    frame[:4] = head
    struct.pack_into(">4sII", frame, parsed.side, b"Info", 1, frames)
    return bytes(frame)


_READERS = (
    (b"RIFF", 0, _wav),
    (b"RIFX", 0, _wav),
    (b"RF64", 0, _rf64),
    (b"BW64", 0, _rf64),
    (b"FORM", 0, _aiff),
    (b".snd", 0, _au),
    (b"dns.", 0, _au),
    (b"caff", 0, _caf),
    (_W64_RIFF, 0, _w64),
    (b"NIST_1A", 0, _sphere),
    (b"fLaC", 0, _flac),
    (b"OggS", 0, _ogg),
)
