"""AU (Sun and NeXT), in either order of bytes."""

from __future__ import annotations

import struct

from fedasr.data.containers.contents import Contents, Unusable
from fedasr.data.containers.lengths import check_single, cut_short, is_placeholder, with_sizes

MAGICS = (b".snd", b"dns.")

# Of a sample, by its encoding.

_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}


def read(content: bytes) -> Contents:
    """An AU file; see `examine`."""
    order = ">" if content[:4] == b".snd" else "<"
    if len(content) < 24:
        raise Unusable("truncated: AU without its whole header")
    start, size, encoding, _, channels = struct.unpack_from(f"{order}IIIII", content, 4)
    there = len(content) - start
    if there < 0:
        raise Unusable("truncated: AU without its sound")
    if unknown := size == 0xFFFFFFFF or (is_placeholder(size) and size > there):
        size = there
    if size > there:
        raise cut_short("AU", there, size)
    _check_rest(content[start + size :])
    each = _BYTES.get(encoding, 0) * channels
    if unknown:
        check_single(content, start, "AU")
    if each and size % each:
        raise Unusable(f"truncated: AU ends within a sample ({size} bytes of {each} each)")
    if unknown:
        content = with_sizes(content, {8: size}, order)
    return Contents((content,), size // each if each else None)


def _check_rest(rest: bytes) -> None:
    """Raises for what follows the sound."""
    if rest.startswith((b".snd", b"dns.")):
        raise Unusable("AU: several recordings in one file: split it")
    if rest.strip(b"\0") or len(rest) > 8:
        raise Unusable(f"AU: {len(rest)} bytes more than its header says: damaged, or not closed")
