"""Who and what an input is, however it is spelled: users, files and recordings."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from pathlib import Path

import numpy as np

# Zero-width space, word joiner, byte order mark and soft hyphen: nobody sees them in a name.
_INVISIBLE = dict.fromkeys((0x200B, 0x2060, 0xFEFF, 0x00AD))


def normalised_user(user: str) -> str:
    """A user's id in one spelling: NFC, single spaces within, none around, nothing invisible.

    Two spellings of one user would be two privacy units. Upper and lower case stay apart: they may
    be two users (see `case_variants`).
    """
    return " ".join(unicodedata.normalize("NFC", user.translate(_INVISIBLE)).split())


def case_variants(users: set[str]) -> int:
    """How many users differ from another by upper and lower case alone."""
    folded: dict[str, int] = {}
    for user in users:
        folded[user.casefold()] = folded.get(user.casefold(), 0) + 1
    return sum(count for count in folded.values() if count > 1)


def recording_digest(samples: np.ndarray, rate: int) -> str:
    """Identifies decoded sound, whatever the file, the container and the name.

    Args:
      samples: float32 [samples] or [samples, channels].
      rate: in Hz.
    """
    digest = hashlib.blake2b(f"{rate} {samples.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples).data)
    return digest.hexdigest()


def labels_digest(labels: np.ndarray) -> str:
    """Identifies a transcript as it is stored, int32 [characters]."""
    return hashlib.blake2b(np.ascontiguousarray(labels).data, digest_size=12).hexdigest()


def resolved(folder: Path, name: str) -> Path:
    """The file that a name means: links followed, in the spelling of the disk.

    Args:
      folder: where relative names start.
      name: as written; where there is no such file, its NFC and NFD spellings are tried, since
        systems differ in which they store.
    """
    path = folder / name
    try:
        if not os.path.lexists(path):
            for form in ("NFC", "NFD"):
                other = folder / unicodedata.normalize(form, name)
                if os.path.lexists(other):
                    path = other
                    break
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # such as a name with a zero byte
        return path


def file_part(file: str | os.PathLike[str] | bytes, *part: float | int | str | None) -> str | None:
    """Identifies a part of a file, under whatever name and link; None for content in memory."""
    if isinstance(file, bytes):
        return None
    try:
        stat = os.stat(file)
        named = f"{stat.st_dev} {stat.st_ino}"
    except (OSError, ValueError):
        named = os.fspath(file)
    return hashlib.blake2b(f"{named} {part}".encode("utf-8", "replace"), digest_size=12).hexdigest()


def file_state(path: Path) -> list[int]:
    """[size, time of change in ns] of a file; [] where there is none."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]
