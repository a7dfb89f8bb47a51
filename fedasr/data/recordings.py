"""Recordings: reading audio files and archives of them, and the features of a waveform."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedasr.data import containers
from fedasr.data.identity import file_state
from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.audio.features import LogMelConfig

# Of what looks like a recording among other files; what it really is, its content says.
AUDIO_ENDINGS = (
    *(".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au", ".sph", ".caf"),
    *(".w64", ".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".mp2", ".snd"),
)
_RATES = 2000, 768_000  # Hz, of recordings
_BLOCK = 1 << 22  # samples read at a time
_TOLERANCE = 0.1  # seconds by which a stated length may differ from the recording's


class Mismatch(ValueError):
    """What is stated of a recording's length disagrees with the recording."""


class Command(str):
    """A command of the shell that writes a recording to its standard output, in place of a file."""


class Decoded(NamedTuple):
    """samples: float32 [samples] or [samples, channels] in [-1, 1]. rate: in Hz.

    complaints: lines that the decoder wrote to the standard error, which were caught.
    """

    samples: np.ndarray
    rate: int
    complaints: int = 0


@dataclass(frozen=True)
class Recording:
    """A recording, or a part of one, that is decoded when it is called.

    Attributes:
      file: a path, the content of a file, or a `Command`.
      start: seconds into the file at which the part begins.
      stop: where it ends; None for the end of the file.
      stated: seconds that the whole file is said to last; None where nobody says.
      channel: which channel to take, from 0; None for all.
    """

    file: str | os.PathLike[str] | bytes
    start: float = 0.0
    stop: float | None = None
    stated: float | None = None
    channel: int | None = None

    @property
    def is_part(self) -> bool:
        """Whether it is less than the file."""
        return self.start > 0 or self.stop is not None

    def __call__(self) -> Decoded:
        """Decodes it.

        Raises:
          Mismatch: the part lies outside the file, or the file is not as long as stated, by more
            than 0.1 s.
          UserError, ValueError: as `read_audio`.
        """
        decoded = _whole(self.file) if self.is_part else read_audio(self.file)
        samples, rate, complaints = decoded
        seconds = len(samples) / rate if rate > 0 else 0.0
        if self.stated is not None and abs(seconds - self.stated) > _TOLERANCE:
            raise Mismatch(f"{self.stated:.3f} s are stated, {seconds:.3f} s are there")
        if self.is_part:
            last = seconds if self.stop is None else self.stop
            if self.start >= seconds or last > seconds + _TOLERANCE:
                raise Mismatch(f"{self.start:.3f} s to {last:.3f} s of {seconds:.3f} s")
            # Of a file that other parts are cut from: a copy, so that it can be let go.
            samples = samples[round(self.start * rate) : round(last * rate)].copy()
        if self.channel is not None:
            channels = samples.shape[1] if samples.ndim > 1 else 1
            if not 0 <= self.channel < channels:
                raise Mismatch(f"channel {self.channel} of {channels}, counted from 0")
            samples = samples[:, self.channel] if samples.ndim > 1 else samples
        return Decoded(samples, rate, complaints)


def read_audio(file: str | os.PathLike[str] | bytes) -> Decoded:
    """Decodes a recording: what libsndfile reads of WAV, FLAC, MP3, Ogg, AIFF, AU, CAF and SPHERE.

    What is returned is all that the file holds, by `fedasr.data.containers`, at any rate and with
    any number of channels; Ogg streams and MP3 that follow one another in a file are one recording.

    Args:
      file: a path, or the content of a file.

    Raises:
      UserError: soundfile is missing.
      ValueError: the file is empty, cut, damaged, of another format, or holds more or fewer samples
        than it says.
      Exception: whatever soundfile raises for a file that it cannot decode.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its C library
        raise UserError(
            f"reading audio needs soundfile ({error}): install it (pip install soundfile)"
        ) from error
    contents = containers.examine(_content(file, soundfile))
    pieces: list[np.ndarray] = []
    rate, complaints = 0, 0
    for part in contents.parts:
        form = (rate, _channels(pieces[0])) if pieces else None
        piece, rate, caught = _decoded_part(part, contents, form, soundfile)
        pieces.append(piece)
        complaints += len(caught)
        if broken := [line for line in caught if "error" in line.lower()]:
            raise containers.Unusable(f"damaged: the decoder says {broken[0].strip()!r}")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise containers.Unusable(f"damaged: no recording has a rate of {rate} Hz")
    audio = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    _check_whole(len(audio), rate, contents)
    return Decoded(audio, rate, complaints)


def _content(file: str | os.PathLike[str] | bytes, soundfile: Any) -> bytes:
    """All of a file; an error of soundfile's where there is none."""
    if isinstance(file, Command):
        return _output(file)
    if isinstance(file, bytes):
        return file
    if not os.path.exists(file):
        raise soundfile.SoundFileRuntimeError(f"no such file: {os.fspath(file)}")
    return Path(file).read_bytes()


def _decoded_part(
    part: bytes, contents: containers.Contents, form: tuple[int, int] | None, soundfile: Any
) -> tuple[np.ndarray, int, list[str]]:
    """(samples, rate, what the decoder complained of); `form`: rate and channels, once known."""
    catching: contextlib.AbstractContextManager[list[str]] = (
        _caught_stderr() if contents.mpeg else contextlib.nullcontext([])
    )
    with catching as caught:
        try:
            with soundfile.SoundFile(io.BytesIO(part)) as opened:
                rate = opened.samplerate
                if form is not None and form != (rate, opened.channels):
                    raise containers.Unusable("several rates or channels in one file")
                samples = _samples(opened, contents)
        except soundfile.LibsndfileError as error:
            # Its prefix would name where the content lies in memory.
            detail = error.error_string.removeprefix("Error : ")
            raise containers.Unusable(f"truncated or damaged: {detail}") from error
    return samples, rate, caught


def _check_whole(samples: int, rate: int, contents: containers.Contents) -> None:
    """Raises where more or fewer samples were decoded than the file holds."""
    expected = contents.frames
    if expected is not None and abs(samples - expected) > contents.slack:
        what = "truncated" if samples < expected else "damaged"
        raise containers.Unusable(f"{what}: {samples} of {expected} samples decoded")
    if contents.seconds is not None and abs(samples / rate - contents.seconds) > _TOLERANCE / 4:
        raise containers.Unusable(
            f"damaged: {samples / rate:.3f} of {contents.seconds:.3f} s decoded"
        )


def _output(command: Command) -> bytes:
    """What a command writes; raises ValueError where it fails."""
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
        raise ValueError(f"exit status {done.returncode} of {str(command)!r}: {said}")
    return done.stdout


def _channels(audio: np.ndarray) -> int:
    return audio.shape[1] if audio.ndim > 1 else 1


def _samples(opened: Any, contents: containers.Contents) -> np.ndarray:
    """All samples of an opened file, float32, checked against FLAC's checksum if there is one."""
    if contents.md5 is None or contents.bits not in (8, 16, 24):
        audio = opened.read(dtype="float32")
        # libsndfile takes the end of a truncated file for the end of the recording.
        if len(audio) < opened.frames and contents.frames is None:
            raise containers.Unusable(f"truncated: {len(audio)} of {opened.frames} samples")
        return audio
    blocks = []  # what the header says may be absurd
    while len(block := opened.read(min(_BLOCK, opened.frames - opened.tell()), dtype="int32")):
        blocks.append(block)
    values = np.concatenate(blocks) if blocks else np.zeros(0, np.int32)
    raw = (values >> (32 - contents.bits)).astype("<i4").view(np.uint8).reshape(-1, 4)
    digest = hashlib.md5(raw[:, : contents.bits // 8].tobytes(), usedforsecurity=False)
    if len(values) and digest.digest() != contents.md5:
        raise containers.Unusable("damaged: FLAC whose samples do not agree with its checksum")
    return values.astype(np.float32) * np.float32(2.0**-31)


@functools.lru_cache(maxsize=1)
def _whole_path(path: str, state: tuple[int, ...]) -> Decoded:
    """The last file of which a part was asked for; `state` tells when it has changed."""
    return read_audio(path)


@functools.lru_cache(maxsize=1)
def _whole_command(command: Command) -> Decoded:
    return read_audio(command)


def _whole(file: str | os.PathLike[str] | bytes) -> Decoded:
    if isinstance(file, bytes):
        return read_audio(file)
    if isinstance(file, Command):
        return _whole_command(file)
    return _whole_path(os.fspath(file), tuple(file_state(Path(file))))


@contextlib.contextmanager
def _caught_stderr() -> Iterator[list[str]]:
    """Gives the lines that C libraries write to the standard error, when it has ended."""
    lines: list[str] = []
    try:
        kept = os.dup(2)
    except OSError:  # closed: there is nothing to catch
        yield lines
        return
    try:
        with tempfile.TemporaryFile() as caught:
            os.dup2(caught.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(kept, 2)
                caught.seek(0)
                lines += [
                    x for x in caught.read(1 << 16).decode("utf-8", "replace").split("\n") if x
                ]
    finally:
        os.close(kept)


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
