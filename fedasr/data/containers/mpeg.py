"""MPEG 1, 2 and 2.5 audio (ISO 11172-3): frames without a container, walked one by one."""

from __future__ import annotations

import struct
from typing import NamedTuple

from fedasr.data.containers.contents import Contents, Unusable
from fedasr.data.containers.tags import tag_size
from fedasr.data.containers.unread import is_adts, what_else

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


class FrameHeader(NamedTuple):
    """Of an MPEG frame; `kind` is what may not change within a recording."""

    kind: tuple[int, int, int, bool]  # version bits, layer, rate, mono
    size: int  # bytes of the frame
    samples: int
    side: int  # bytes from the frame's start to where an encoder's own header would stand


def frame_header(content: bytes, at: int) -> FrameHeader | None:
    """Of the frame that begins at a place; None where none does."""
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
    return FrameHeader((version, layer, rate, mono), size, samples, side)


def find(content: bytes, start: int) -> bool:
    """Whether a frame of MPEG audio begins at a place; AAC's look alike, but are of no layer."""
    return frame_header(content, start) is not None and not is_adts(content, start)


def read(content: bytes, start: int) -> Contents:
    """MPEG audio whose first frame begins at `start`, behind tags; see `examine`."""
    first = frame_header(content, start)
    assert first is not None  # see `find`
    layer = first.kind[1]
    what = "MP3" if layer == 3 else f"MPEG layer {layer}"
    frames, declared = _walk(content, start, first, what)
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


def _declared(content: bytes, at: int, header: FrameHeader) -> int | None:
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


def _walk(
    content: bytes, start: int, first: FrameHeader, what: str
) -> tuple[list[tuple[int, int]], list[int]]:
    """(place and bytes of each frame of sound, the numbers of them that encoders declare)."""
    at = start
    frames: list[tuple[int, int]] = []
    declared: list[int] = []
    while at < len(content):
        header = frame_header(content, at)
        if header is None:
            if size := tag_size(content, at):
                at += size
                continue
            if not (rest := content[at:]).strip(b"\0"):
                break
            raise _no_frame(rest, at, len(frames), what)
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
    return frames, declared


def _no_frame(rest: bytes, at: int, frames: int, what: str) -> Unusable:
    """What is wrong where neither a frame nor a tag stands."""
    if len(rest) < 4 and rest[:1] == b"\xff":
        return Unusable(f"truncated: {what} ends within a frame")
    return Unusable(
        f"{what}: what stands at byte {at} is no frame (after {frames} of them): "
        f"damaged, or {what_else(rest, 0)}"
    )


def _info_frame(header: bytes, frames: int) -> bytes:
    """The frame without sound that tells a decoder how many frames follow."""
    # No checksum, no padding, and a bit rate at which the frame is long enough.
    head = bytes((header[0], header[1] | 1, (header[2] & 0x0D) | 0x90, header[3]))
    parsed = frame_header(head, 0)
    assert parsed is not None  # it is made from one that was read
    frame = bytearray(parsed.size)
    frame[:4] = head
    struct.pack_into(">4sII", frame, parsed.side, b"Info", 1, frames)
    return bytes(frame)
