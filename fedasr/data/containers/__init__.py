"""What an audio file holds, by its container: so that a decoder's guess is never taken for truth.

libsndfile reports as the number of samples what it guesses (MP3 without a header), repairs (WAV cut
in transfer) or finds in the first of several streams (Ogg). Here the container itself is asked:
MPEG frames are walked, chunk sizes compared with the file's, Ogg pages checked one by one. A file
is then whole, and may be handed to the decoder with its lengths written where its writer, a pipe,
could not go back to write them; or it is refused with a reason.

Formats: RIFF/RIFX/RF64 (WAV), AIFF and AIFF-C (Apple/EA IFF 85), AU, CAF, W64, NIST SPHERE, FLAC
(RFC 9639), Ogg (RFC 3533) with Vorbis, Opus (RFC 7845) or FLAC, MPEG 1/2/2.5 audio (ISO 11172-3).
Each is a module here; a new one is such a file and one line in `CONTAINERS`.
"""

from __future__ import annotations

from typing import Protocol

from fedasr.data.containers import aiff, au, caf, flac, mpeg, ogg, sphere, tags, unread, w64, wav
from fedasr.data.containers.contents import Contents, Unusable

__all__ = ["CONTAINERS", "Container", "Contents", "Unusable", "examine"]


class Container(Protocol):
    """A module that reads one container.

    MAGICS: with which of these its files begin. read: from all of a file to what it holds; raises
    `Unusable`.
    """

    @property
    def MAGICS(self) -> tuple[bytes, ...]: ...

    def read(self, content: bytes) -> Contents: ...


# MPEG audio is no container: it has no magic, and is looked for behind tags where nothing else is.
CONTAINERS: tuple[Container, ...] = (wav, aiff, au, caf, w64, sphere, flac, ogg)


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
    for container in CONTAINERS:
        if content.startswith(container.MAGICS):
            return container.read(content)
    start = tags.leading(content)
    if content.startswith(flac.MAGICS, start):
        return flac.read(content[start:])
    if mpeg.find(content, start):
        return mpeg.read(content, start)
    raise Unusable(unread.what_else(content, start))
