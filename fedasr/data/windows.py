"""Recordings of any length, a bounded part at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedasr.audio import features
from fedasr.data.recordings import read_audio
from fedasr.errors import UserError

RATE = 16_000
LONGEST, CONTEXT = 40.0, 1.0  # seconds
_WHOLE = 300.0  # seconds: shorter recordings are decoded at once, as preparation does
_BLOCK = 60 * RATE  # samples read at a time of longer ones
_QUIET, _STEP = RATE // 5, RATE // 20  # samples: of what has to be quiet, and between candidates


class Window(NamedTuple):
    """A part of a recording.

    samples: float32 [n], at 16 kHz. first, last: samples between which it counts; what lies before
    and after is context. start: seconds of the recording at `first`.
    """

    samples: np.ndarray
    first: int
    last: int
    start: float


def read_blocks(file: str | os.PathLike[str] | bytes) -> Iterator[np.ndarray]:
    """A recording, one channel at 16 kHz, block by block.

    Up to five minutes come as preparation reads them, checks and all; what is longer in blocks of
    a minute, so that memory does not grow with its length.

    Args:
      file: a path, or the content of a file.

    Raises:
      UserError: it cannot be read, in one line.
    """
    try:
        if (opened := _long(file)) is not None:
            yield from _streamed(opened)
            return
        samples, rate, _ = read_audio(file)
        yield features.to_mono_16k(np.asarray(samples), rate)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(" ".join(str(error).split())[:300] or type(error).__name__) from error


def _long(file: str | os.PathLike[str] | bytes) -> Any:
    """An opened recording of more than `_WHOLE` seconds; None for all others."""
    import soundfile

    try:
        opened = soundfile.SoundFile(io.BytesIO(file) if isinstance(file, bytes) else file)
    except (soundfile.LibsndfileError, RuntimeError):
        return None  # what is wrong with it `read_audio` says
    if opened.frames > _WHOLE * opened.samplerate:
        return opened
    opened.close()
    return None


def _streamed(opened: Any) -> Iterator[np.ndarray]:
    """Blocks of an opened recording at 16 kHz; raises ValueError where it ends too early."""
    with opened:
        resampler = None
        if opened.samplerate != RATE:
            import soxr

            resampler = soxr.ResampleStream(opened.samplerate, RATE, 1, "float32", quality="HQ")
        size, count = round(_BLOCK * opened.samplerate / RATE), 0
        while len(block := opened.read(size, dtype="float32", always_2d=True)):
            count += len(block)
            mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float32))
            last = count >= opened.frames
            yield mono if resampler is None else resampler.resample_chunk(mono, last=last)
        if count < opened.frames:
            raise ValueError(f"truncated: {count} of {opened.frames} samples")


def windows(
    blocks: Iterator[np.ndarray], longest: float = LONGEST, context: float = CONTEXT
) -> Iterator[Window]:
    """Parts of at most `longest` seconds that cover a recording without overlap.

    What is no longer comes whole. What is longer is cut where it is quietest in the last third of
    each part, and parts have `context` seconds of their neighbours on both sides, for the model to
    hear.

    Args:
      blocks: float32 [n] each, one after another, at 16 kHz.
      longest, context: seconds.

    Raises:
      UserError: samples that are not finite.
    """
    most, around = round(longest * RATE), round(context * RATE)
    held, first, start = np.zeros(0, np.float32), 0, 0  # start: of `held` in the recording
    blocks, ended = iter(blocks), False
    while True:
        while not ended and len(held) <= first + most + around:
            block = next(blocks, None)
            ended = block is None
            if block is not None:
                if not np.isfinite(block).all():
                    raise UserError("the audio holds samples that are not finite")
                held = np.concatenate([held, block])
        if ended and len(held) - first <= most:
            yield Window(held, first, len(held), (start + first) / RATE)
            return
        cut = _quietest(held, first + 2 * most // 3, min(first + most, len(held)))
        yield Window(held[: cut + around], first, cut, (start + first) / RATE)
        drop = max(cut - around, 0)
        held, start, first = held[drop:], start + drop, cut - drop


def _quietest(samples: np.ndarray, low: int, high: int) -> int:
    """The middle of the fifth of a second with the least energy."""
    places = np.arange(low, max(high - _QUIET, low + 1), _STEP)
    energy = [float(np.square(samples[i : i + _QUIET]).mean()) for i in places]
    return int(places[int(np.argmin(energy))]) + _QUIET // 2


def audio_files(paths: list[str], endings: tuple[str, ...]) -> list[Path]:
    """Recordings that paths name: files as they are, of folders all that look like one, sorted.

    Raises:
      UserError: there is no such file, or a folder without recordings.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(x for x in path.rglob("*") if x.suffix.lower() in endings)
            if not inside:
                raise UserError(f"{path} holds no recordings ({', '.join(endings[:5])} ...)")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found
