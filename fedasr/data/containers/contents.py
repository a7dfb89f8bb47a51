"""What is known of a file that is whole, and what is said of one that is not."""

from __future__ import annotations

from dataclasses import dataclass

CONVERT = "convert it, for example: ffmpeg -i IN OUT.flac"


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
