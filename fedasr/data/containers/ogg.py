"""Ogg (RFC 3533) with Vorbis or Opus (RFC 7845)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from fedasr.data.containers.contents import CONVERT, Contents, Unusable

MAGICS = (b"OggS",)


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _crc(page: bytes) -> int:
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


def read(content: bytes) -> Contents:
    """An Ogg file; see `examine`."""
    links: list[_Link] = []
    at = 0
    while at < len(content):
        page = _page(content, at)
        _take_page(links, page, at)
        at = page.stop
    if not links[-1].stop:
        raise _no_end(links[-1])
    seconds = [_seconds(link) for link in links]
    parts = tuple(content[link.start : link.stop] for link in links)
    known = [s for s in seconds if s is not None]
    return Contents(parts, seconds=sum(known) if len(known) == len(links) else None)


def _page(content: bytes, at: int) -> _Page:
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
    if _crc(content[at : at + 22] + bytes(4) + content[at + 26 : end]) != crc:
        raise Unusable(f"Ogg: the page at byte {at} does not agree with its checksum: damaged")
    return _Page(content[at + 5], granule, serial, number, content[body:end], end)


def _take_page(links: list[_Link], page: _Page, at: int) -> None:
    """Adds the page at a place to the links of a chain of streams."""
    open_link = links[-1] if links and not links[-1].stop else None
    if page.flags & 2:
        if open_link is not None:
            # Streams side by side begin before any of them has a second page.
            if open_link.next == 1:
                raise Unusable(f"Ogg with several streams at a time: {CONVERT}")
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


def _seconds(link: _Link) -> float | None:
    head = link.head
    if head.startswith(b"\x01vorbis") and len(head) >= 16:
        rate = struct.unpack_from("<I", head, 12)[0]
        return link.granule / rate if rate else None
    if head.startswith(b"OpusHead") and len(head) >= 12:
        return max(0, link.granule - struct.unpack_from("<H", head, 10)[0]) / 48000
    if head.startswith(b"\x7fFLAC"):
        raise Unusable(f"FLAC in Ogg, which libsndfile does not read: {CONVERT}")
    if head.startswith(b"Speex"):
        raise Unusable(f"Speex, which is not read: {CONVERT}")
    raise Unusable(f"Ogg with no sound that is read ({head[:8]!r}): {CONVERT}")
