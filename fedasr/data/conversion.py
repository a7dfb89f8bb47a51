"""From utterances to what a corpus stores, in parts that several processes make.

The input is cut into parts of `PART` utterances in its order. A part is a pair of files: the
arrays, and a JSON file that is written last and says what they are. What a part holds depends on
nothing but its input, so that the number of processes changes nothing, and a preparation that was
killed goes on with the parts that are finished.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from fedasr import text as text_lib
from fedasr.data import identity
from fedasr.data.corpus import valid_split_name
from fedasr.data.recordings import Mismatch, Recording, log_mel_on_cpu
from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.audio.features import LogMelConfig

PART = 64  # utterances; a part with the content of their files is sent to a process at once
STORES = ("features", "audio")

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Utterance:
    """One recording with its transcript.

    Attributes:
      id: unique within the corpus.
      user: who speaks; privacy and federated learning are per user.
      text: transcript as written; `fedasr.text` normalises it.
      split: the split it belongs to, or None to leave the choice to `prepare`.
      audio: returns (samples float32 [samples] or [samples, channels] in [-1, 1], rate in Hz), and
        perhaps how many complaints of a decoder were caught. To be called in another process it
        must be picklable. Recordings are compared with one another where it is a
        `fedasr.data.recordings.Recording`.
      metadata: what else the source knows of it (age, gender, accent, device ...), for reports.
    """

    id: str
    user: str
    text: str
    split: str | None
    audio: Callable[[], tuple[Any, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """An input that its source could not turn into an utterance; `prepare` counts it.

    Attributes:
      id: where it came from.
      reason: the count it belongs to.
      detail: one line for people.
    """

    id: str
    reason: str
    detail: str


class Skip(Exception):
    """Leaves one utterance out: (reason, detail)."""


class Converted(NamedTuple):
    """What is stored of one utterance.

    signal: features float16 [frames, mels] or audio int16 [samples]. labels: int32 [characters].
    seconds: of the recording. saturated: whether samples beyond [-1, 1] were cut to int16.
    recording: identifies what was decoded; None where the source is no recording. complaints: of
    the decoder.
    """

    signal: np.ndarray
    labels: np.ndarray
    seconds: float
    saturated: bool
    recording: str | None = None
    complaints: int = 0


class Conversion(Protocol):
    """Turns utterances into what is stored: a data class that can be pickled.

    store: name of the stored signal. characters: alphabet of the labels. trailing, dtype: of the
    stored signal, the shape without axis 0. Its call raises `Skip` for what cannot be used.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def store(self) -> str: ...
    @property
    def characters(self) -> str | list[str]: ...
    @property
    def trailing(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> type: ...
    def __call__(self, utterance: Utterance) -> Converted: ...


@dataclass(frozen=True)
class Converter:
    """Computes what is stored; the fields are arguments of `fedasr.data.prepare.prepare`."""

    features: LogMelConfig
    language: str
    keep_letters: bool
    store: str
    pad_space: bool
    stride: int
    min_frames: int
    max_seconds: float
    alphabet: str = ""
    subwords: Mapping[str, str] | None = None
    learned: bool = False

    @property
    def characters(self) -> str | list[str]:
        """The alphabet of the labels, or the pieces of a subword tokenizer."""
        return self._tokenizer.characters

    @property
    def _tokenizer(self) -> text_lib.Tokenizer:
        if self.subwords:
            return text_lib.subwords_of(self.subwords)
        characters = self.alphabet or text_lib.alphabet(self.language, self.keep_letters)
        return text_lib.CharTokenizer(characters)

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape of the stored signal after axis 0."""
        return (self.features.num_mels,) if self.store == "features" else ()

    @property
    def dtype(self) -> type:
        """Of the stored signal."""
        return np.float16 if self.store == "features" else np.int16

    def __call__(self, utterance: Utterance) -> Converted:
        """Converts one utterance.

        Raises:
          Skip: it cannot be used.
          UserError: no utterance can be, such as for want of a package.
        """
        from fedasr.audio import features as features_lib

        labels = labels_of(utterance.text, self.language, self._tokenizer, self.pad_space)
        audio, rate, complaints = _decoded(utterance)
        if not rate > 0:
            raise Skip("unreadable_audio", f"a sample rate of {rate}")
        if not audio.size:
            raise Skip("unreadable_audio", "no samples")
        seconds = len(audio) / rate
        # What is reported must be of all of a test set: the limit is for what is trained on.
        if seconds > self.max_seconds and not (utterance.split or "").startswith(("dev", "test")):
            raise Skip("too_long", f"{seconds:.2f} s, at most {self.max_seconds} s")
        if not np.isfinite(audio).all():
            raise Skip("non_finite_audio", "NaN or Inf samples")
        waveform = features_lib.to_mono_16k(audio, rate, self.features)
        frames = features_lib.num_frames(len(waveform), self.features)
        if frames < self.min_frames:
            raise Skip("too_short", f"{frames} frames, at least {self.min_frames}")
        check_feasible(labels, frames, self.stride)
        recording = None
        if isinstance(utterance.audio, Recording):
            recording = identity.recording_digest(audio, rate)
        if self.store == "audio":
            if not np.isfinite(waveform).all():
                raise Skip("non_finite_audio", "the samples overflow")
            scaled = np.round(waveform * np.float32(features_lib.INT16_SCALE))
            cut = np.clip(scaled, -32768, 32767)
            saturated = bool((np.abs(waveform) > 1).any())
            signal = cut.astype(np.int16)
            return Converted(signal, labels, seconds, saturated, recording, complaints)
        features = log_mel_on_cpu(waveform, self.features)
        if not np.isfinite(features).all():  # finite samples, but absurdly large ones
            raise Skip("non_finite_audio", "the features overflow")
        signal = features.astype(np.float16)
        return Converted(signal, labels, seconds, False, recording, complaints)


def labels_of(
    text: str, language: str, tokenizer: text_lib.Tokenizer, pad_space: bool
) -> np.ndarray:
    """The ids of a transcript, int32 [tokens].

    Raises:
      Skip: "unknown_characters" or "empty_text".
    """
    # A subword tokenizer's pieces are no alphabet; the characters in them are.
    characters: Any = getattr(tokenizer, "alphabet", tokenizer.characters)
    found = text_lib.normalise(text, language, characters)
    if found.losses:
        raise Skip("unknown_characters", text_lib.describe_losses(found.losses, text))
    if not found.text:
        raise Skip("empty_text", repr(text))
    try:
        return np.asarray(tokenizer.encode(found.text, pad_space=pad_space), np.int32)
    except UserError as error:  # pieces that cannot write this text
        raise Skip("unwritable_text", str(error)) from error


def check_feasible(labels: np.ndarray, frames: int, stride: int) -> None:
    """Raises Skip("infeasible") where CTC cannot align the labels with ceil(frames / stride)."""
    needed = len(labels) + int(np.count_nonzero(labels[1:] == labels[:-1]))
    if needed > (there := -(-frames // stride)):
        raise Skip("infeasible", f"{needed} output frames needed, {there} there")


def _decoded(utterance: Utterance) -> tuple[np.ndarray, int, int]:
    """(samples, rate, complaints of the decoder)."""
    try:
        audio, rate, *more = utterance.audio()
    except (UserError, MemoryError):
        raise
    except Mismatch as error:
        raise Skip("duration_mismatch", str(error)) from error
    except ValueError as error:  # says itself what is wrong
        raise Skip("unreadable_audio", str(error)) from error
    except Exception as error:
        raise Skip("unreadable_audio", f"{type(error).__name__}: {error}") from error
    return np.asarray(audio), rate, sum(more)


# ---------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, slots=True)
class Row:
    """Where one utterance lies: in which part, from which byte, and how much of it.

    `recording` and `transcript` identify what was said, `file` the file and the part of it that it
    was read from, with the transcript as written; `spelling` is the user's id as the source wrote
    it, where that differs.
    """

    id: str
    user: str
    split: str | None
    part: int
    offset: int
    length: int
    characters: int
    seconds: float
    saturated: bool
    recording: str | None = None
    transcript: str = ""
    complaints: int = 0
    spelling: str | None = None
    file: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An utterance left out; `user` is None where the source did not say."""

    id: str
    user: str | None
    reason: str
    detail: str


def convert_all(
    items: Iterable[Utterance | Rejected],
    converter: Conversion,
    folder: Path,
    workers: int,
    total: int | None,
    progress: Progress | None,
) -> int:
    """Makes all parts that are not in `folder` yet, and returns their number.

    Args:
      items: the input, read once and by this process only.
      converter: of each utterance.
      folder: of the parts; parts of the same input made by the same converter are kept.
      workers: processes; 1 converts in this one.
      total: number of inputs if known, for `progress`.
      progress: called with (inputs done, total): after each input with one worker, after each part
        with more.

    Raises:
      UserError: an utterance raised it, a source cannot be sent to processes, or one of them died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = iter(items)
    parts = itertools.takewhile(bool, (list(itertools.islice(stream, PART)) for _ in iter(int, 1)))
    numbered = enumerate(parts)
    done = count = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    def unfinished() -> Iterator[tuple[int, list, str]]:
        nonlocal count
        for number, part in numbered:
            count += 1
            digest = _digest(part)
            if _is_finished(folder, number, digest):
                report(len(part))
            else:
                yield number, part, digest

    tasks = unfinished()
    if workers > 1 and (first := list(itertools.islice(tasks, 2))):
        tasks = itertools.chain(first, tasks)
        if len(first) == 2:  # starting processes would take longer than one part
            _in_processes(tasks, converter, folder, workers, report)
            return count
    for number, part, digest in tasks:
        _write_part(converter, part, folder, number, digest, report)
    return count


def _in_processes(
    tasks: Iterable[tuple[int, list, str]],
    converter: Conversion,
    folder: Path,
    workers: int,
    report: Callable[[int], None],
) -> None:
    # Spawned, not forked: JAX's threads would not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    running: dict[concurrent.futures.Future, int] = {}

    def wait(limit: int) -> None:
        while len(running) > limit:
            finished, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                size = running.pop(future)
                future.result()
                report(size)

    try:
        for number, part, digest in tasks:
            try:
                task = pickle.dumps((converter, part, folder, number, digest))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise UserError(
                    f"these utterances cannot be sent to other processes ({error}): use workers=1"
                ) from error
            running[pool.submit(_work, task)] = len(part)
            wait(workers + 1)  # few enough that what waits stays small
        wait(0)
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the preparation died (out of memory?): run it again, with fewer workers; "
            "it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Sets up a process: the CPU only, and an end when the parent ends, however that happens."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerators belong to the parent
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is a worker
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(task: bytes) -> None:
    _write_part(*pickle.loads(task))


def _write_part(
    converter: Conversion,
    items: list[Utterance | Rejected],
    folder: Path,
    number: int,
    digest: str,
    report: Callable[[int], None] = lambda more: None,
) -> None:
    data_path, rows_path = _paths(folder, number)
    rows_path.unlink(missing_ok=True)  # of another input, and no longer of these arrays
    rows: list[list[Any]] = []
    with open(data_path, "wb") as data:
        for item in items:
            rows.append(_converted(converter, item, data))
            report(1)
        size = data.tell()
    temporary = rows_path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"digest": digest, "bytes": size, "rows": rows}))
    os.replace(temporary, rows_path)


def _converted(converter: Conversion, item: Utterance | Rejected, data: Any) -> list[Any]:
    """Writes what is stored of an input, and returns the fields of its `Row` or `Skipped`."""
    user = None
    try:
        if isinstance(item, Rejected):
            raise Skip(item.reason, item.detail)
        if not (user := identity.normalised_user(item.user)):
            raise Skip("bad_user", f"{item.user!r} is empty")
        if item.split is not None and not valid_split_name(item.split):
            raise Skip("bad_split", repr(item.split))
        converted = converter(item)
    except Skip as skip:
        reason, detail = skip.args
        return [item.id, user, reason, " ".join(detail.split())[:300]]
    offset = data.tell()
    data.write(converted.signal.tobytes())
    data.write(converted.labels.tobytes())
    where = [offset, len(converted.signal), len(converted.labels)]
    return [
        *(item.id, user, item.split, *where, converted.seconds, converted.saturated),
        *(converted.recording, identity.labels_digest(converted.labels), converted.complaints),
        *(item.user if item.user != user else None, _file_of(item), dict(item.metadata)),
    ]


def _file_of(item: Utterance) -> str | None:
    if not isinstance(audio := item.audio, Recording):
        return None
    return identity.file_part(audio.file, audio.start, audio.stop, audio.channel, item.text)


def read_rows(folder: Path, parts: int) -> Iterator[Row | Skipped]:
    """What became of each input, in the order of the input."""
    for number in range(parts):
        for fields in json.loads(_paths(folder, number)[1].read_bytes())["rows"]:
            if len(fields) == 4:
                yield Skipped(*fields)
            else:
                id, user, split, *rest = fields
                yield Row(id, user, split, number, *rest)


def read_signal(folder: Path, row: Row, converter: Conversion) -> tuple[np.ndarray, np.ndarray]:
    """(signal, labels) of a row; see `Converted`."""
    values = row.length * int(np.prod(converter.trailing, dtype=np.int64))
    with open(_paths(folder, row.part)[0], "rb") as data:
        data.seek(row.offset)
        signal: np.ndarray = np.frombuffer(
            data.read(values * np.dtype(converter.dtype).itemsize), converter.dtype
        )
        labels = np.frombuffer(data.read(4 * row.characters), np.int32)
    return signal.reshape(row.length, *converter.trailing), labels


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:08d}.bin", folder / f"{number:08d}.json"


def _is_finished(folder: Path, number: int, digest: str) -> bool:
    data, rows = _paths(folder, number)
    try:
        content = json.loads(rows.read_bytes())
        return content["digest"] == digest and content["bytes"] == data.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(items: list[Utterance | Rejected]) -> str:
    """Of what the source says of the inputs; that their audio is the same is for the caller."""
    facts = [
        [x.id, x.reason, x.detail]
        if isinstance(x, Rejected)
        else [x.id, x.user, x.text, x.split, dict(x.metadata)]
        for x in items
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
