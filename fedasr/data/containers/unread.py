"""Files that libsndfile does not read: what they are, and how to convert them."""

from __future__ import annotations

from fedasr.data.containers.contents import CONVERT

_TEXT_SHOWN = 24


def what_else(content: bytes, start: int) -> str:
    """One line on a file that cannot be read."""
    head = content[:256].lstrip().lower()
    if content[4:8] == b"ftyp":
        return f"AAC or ALAC in an MP4 file, which libsndfile does not read: {CONVERT}"
    if is_adts(content, start):
        return f"AAC (ADTS), which libsndfile does not read: {CONVERT}"
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
            return f"{name}, which is not read: {CONVERT}"
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
    return f"no format that is read (it begins with {shown!r}): {CONVERT}"


def is_adts(content: bytes, start: int) -> bool:
    """Whether a frame of AAC begins at a place."""
    return (
        len(content) > start + 7
        and content[start] == 0xFF
        and content[start + 1] & 0xF6 == 0xF0  # sync, layer 0: MPEG audio knows no such layer
    )
