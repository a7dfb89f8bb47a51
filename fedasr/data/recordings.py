"""Recordings: reading audio files and archives of them, and the features of a waveform."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedasr.data import containers
from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.audio.features import LogMelConfig

ARCHIVES = (".tar.gz", ".tgz", ".tar")
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
    if isinstance(file, Command):
        file = _output(file)
    elif not isinstance(file, bytes):
        if not os.path.exists(file):
            raise soundfile.SoundFileRuntimeError(f"no such file: {os.fspath(file)}")
        file = Path(file).read_bytes()
    contents = containers.examine(file)
    pieces: list[np.ndarray] = []
    rate, complaints = 0, 0
    for part in contents.parts:
        catching: contextlib.AbstractContextManager[list[str]] = (
            _caught_stderr() if contents.mpeg else contextlib.nullcontext([])
        )
        with catching as caught:
            try:
                with soundfile.SoundFile(io.BytesIO(part)) as opened:
                    form = opened.samplerate, opened.channels
                    if pieces and form != (rate, _channels(pieces[0])):
                        raise containers.Unusable("several rates or channels in one file")
                    rate = opened.samplerate
                    pieces.append(_samples(opened, contents))
            except soundfile.LibsndfileError as error:
                # Its prefix would name where the content lies in memory.
                detail = error.error_string.removeprefix("Error : ")
                raise containers.Unusable(f"truncated or damaged: {detail}") from error
        complaints += len(caught)
        if broken := [line for line in caught if "error" in line.lower()]:
            raise containers.Unusable(f"damaged: the decoder says {broken[0].strip()!r}")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise containers.Unusable(f"damaged: no recording has a rate of {rate} Hz")
    audio = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    expected = contents.frames
    if expected is not None and abs(len(audio) - expected) > contents.slack:
        what = "truncated" if len(audio) < expected else "damaged"
        raise containers.Unusable(f"{what}: {len(audio)} of {expected} samples decoded")
    if contents.seconds is not None and abs(len(audio) / rate - contents.seconds) > _TOLERANCE / 4:
        raise containers.Unusable(
            f"damaged: {len(audio) / rate:.3f} of {contents.seconds:.3f} s decoded"
        )
    return Decoded(audio, rate, complaints)


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
        with opened(path, "rb") as raw:
            stream = _Remembering(raw)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    # Tarfile would keep a million of them, in a list that its types do not name.
                    archive.members.clear()  # type: ignore[attr-defined]
                    name = member.name
                    if member.isfile() and not os.path.basename(name).startswith("."):
                        content = archive.extractfile(member) if wanted(name) else None
                        yield name, None if content is None else content.read()
                # tarfile takes a damaged header, and the end of the file, for the archive's end.
                if stream.last != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.TarError("its end is missing, or a header is damaged")
                while rest := stream.read(1 << 20):  # gzip checks its sum at the very end
                    if rest.strip(b"\0"):
                        raise tarfile.TarError("something follows its end")
    except (OSError, EOFError, zlib.error, ValueError, tarfile.TarError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the archive {path} is damaged or incomplete ({detail})") from error


class _Remembering(io.RawIOBase):
    """A stream that knows what it gave last."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        self.last = self._stream.read(size)
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def file_state(path: Path) -> list[int]:
    """[size, time of change in ns] of a file; [] where there is none."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]
