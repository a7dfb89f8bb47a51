"""Utterances converted in parts, which several processes make.

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
from typing import Any

import numpy as np

from fedasr.data import identity
from fedasr.data.corpus import valid_split_name
from fedasr.data.preparation.conversion import Conversion, Skip
from fedasr.data.recordings import Recording
from fedasr.data.utterances import Progress, Rejected, Utterance
from fedasr.errors import UserError

PART = 64  # utterances; a part with the content of their files is sent to a process at once


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
