"""Recordings: reading audio files and archives of them, and the features of a waveform."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.audio.features import LogMelConfig

ARCHIVES = (".tar.gz", ".tgz", ".tar")
# The length of an MP3 without its encoder's own header is known to a frame only.
_MP3_SLACK = 1152


def read_audio(file: str | os.PathLike[str] | bytes) -> tuple[np.ndarray, int]:
    """Decodes a recording: whatever soundfile reads, at any rate and with any number of channels.

    Args:
      file: a path, or the content of a file.

    Returns:
      (float32 [samples] or [samples, channels] in [-1, 1], rate in Hz).

    Raises:
      UserError: soundfile is missing.
      ValueError: the file is empty, or holds fewer samples than it says.
      Exception: whatever soundfile raises for a file that it cannot decode.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its C library
        raise UserError(
            f"reading audio needs soundfile ({error}): install it (pip install soundfile)"
        ) from error
    if not file if isinstance(file, bytes) else os.path.isfile(file) and not os.path.getsize(file):
        raise ValueError("the file is empty")
    with soundfile.SoundFile(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        audio = opened.read(dtype="float32")
        slack = _MP3_SLACK if opened.format.startswith("MP") else 0
        # libsndfile takes the end of a truncated file for the end of the recording.
        if len(audio) < opened.frames - slack:
            raise ValueError(f"truncated: {len(audio)} of {opened.frames} samples")
        return audio, opened.samplerate


def log_mel_on_cpu(waveform: np.ndarray, config: LogMelConfig) -> np.ndarray:
    """`fedasr.audio.features.extract` on the CPU, so that every process gives the same bits.

    Args:
      waveform: float [samples] in [-1, 1], at `config.sample_rate`.
      config: parameters.

    Returns:
      float32 [frames, mels].

    Raises:
      UserError: JAX was told not to use the CPU, or as `extract`.
    """
    import jax

    from fedasr.audio import features

    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError("features are computed on the CPU: add cpu to JAX_PLATFORMS") from error
    with jax.default_device(device):
        return np.asarray(features.extract(waveform, config))


def is_archive(path: Path) -> bool:
    """Whether this is a file that is named like a tar archive."""
    return path.name.endswith(ARCHIVES) and path.is_file()


def archive_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of each file in a tar archive, in its order and read as a stream.

    Hidden files (such as the "._" files that macOS adds) are left out.

    Args:
      path: the archive.
      wanted: of which names to read the content; it is None for others.

    Raises:
      UserError: the archive cannot be read to its end.
    """
    opened = open if path.name.endswith(".tar") else gzip.open
    try:
        with opened(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep a million of them
                name = member.name
                if member.isfile() and not os.path.basename(name).startswith("."):
                    yield name, archive.extractfile(member).read() if wanted(name) else None
            while stream.read(1 << 20):  # gzip checks its sum at the very end
                pass
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the archive {path} is damaged or incomplete ({detail})") from error


def file_state(path: Path) -> list[int]:
    """[size, time of change in ns] of a file; [] where there is none."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]
