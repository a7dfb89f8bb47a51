"""What a run tells: `metrics.jsonl`, TensorBoard events and progress on stderr."""

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from absl import logging

from fedasr.training.sinks import Sink
from fedasr.training.trackers import Told

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_TRACKER_SECONDS = 60.0  # that the end of a run waits for each of others' trackers
_INFINITE = "_infinite"  # ends the name of the word about a number that JSON cannot hold


def say(text: str) -> None:
    """A line on stderr; whether anybody listens makes no difference."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def to_json(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, keys as strings.

    An infinity becomes null with a word beside it, {"epsilon": null, "epsilon_infinite": true}, or
    "negative" for minus infinity; for a list that holds any, the word is a list of the same shape,
    false where the number is finite. NaN becomes null alone: what is not defined. `from_json` reads
    it back. Settings are not for this: see
    `fedasr.training.config.resolve`.

    Anything else that JSON does not know (paths, enumerations...) becomes its `str`.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            plain[str(key)] = to_json(item)
            if infinite := _infinite(item):
                plain[f"{key}{_INFINITE}"] = infinite
        return plain
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return to_json(_plain_array(value))
    if isinstance(value, Iterable):
        return [to_json(item) for item in value]
    return str(value)


def _plain_array(value: Any) -> Any:
    """An array as nested lists of Python's numbers, a scalar as one of them."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuUO":
        # float32 by its shortest decimal: 0.1 rather than 0.10000000149011612.
        if array.dtype.itemsize <= 4 and array.ndim == 0:
            return float(str(array.astype(np.float32)))
        array = array.astype(np.float64)
    return array.tolist()


def _infinite(value: Any) -> bool | str | list[Any]:
    """Which of the numbers are infinite, as `to_json` says it; false or empty where none is."""
    if isinstance(value, float) and math.isinf(value):
        return True if value > 0 else "negative"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _infinite(_plain_array(value))
    if isinstance(value, list | tuple):
        found = [_infinite(item) for item in value]
        return found if any(found) else False
    return False


def from_json(value: Any) -> Any:
    """What `to_json` wrote, with its infinities as numbers again (and without the words)."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    read = {}
    for key, item in value.items():
        name = key.removesuffix(_INFINITE)
        if name == key or name not in value:
            read[key] = _restored(from_json(item), value.get(f"{key}{_INFINITE}"))
        elif _restored(value[name], item) == value[name]:  # a word of somebody else's
            read[key] = from_json(item)
    return read


def _restored(value: Any, infinite: Any) -> Any:
    if value is None and infinite in (True, "negative"):
        return math.inf if infinite is True else -math.inf
    if isinstance(value, list) and isinstance(infinite, list) and len(value) == len(infinite):
        return [_restored(*pair) for pair in zip(value, infinite, strict=True)]
    return value


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Writes `to_json(obj)` to `path`; a reader sees the old file or the new one, never a part."""
    text = json.dumps(to_json(obj), indent=2, allow_nan=False) + "\n"
    _replace(Path(path), text)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` in the order written; empty without the file.

    A last line that was cut off by a kill is left out. Other lines that are not JSON objects are
    left out with a warning.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = from_json(json.loads(line))
        except ValueError:
            record = None
        if isinstance(record, dict) and number < len(lines):
            records.append(record)
        elif line and number < len(lines):
            logging.warning("%s: line %d is not a JSON object and is ignored", path, number)
    return records


class RunLogger:
    """Logs one run: each logged round exactly once, however often the run is resumed.

    Records go to `metrics.jsonl`, one JSON object a line, flushed before the call returns, with a
    `phase` ("seed" or "federated") and a `step` or `round`; their numbers also go to TensorBoard
    events in `tensorboard/PHASE` (if tensorboardX is installed). Progress goes to stderr: a bar on
    a terminal (if rich is installed), a plain line now and then elsewhere.

    None of these can harm the run: one that fails or hangs is named once, as a message and in
    `failures`, and what it would have been told is lost.

    Args:
        workdir: the work directory, created if missing.
        resume_round: round of the checkpoint that the run continues from: later rounds will be
            repeated, so their records are dropped. None starts afresh: all records are dropped.
        resume_step: likewise for the seed's training steps; None keeps all of them (if
            `resume_round` is not None).
        tensorboard: whether to write TensorBoard events.
        interval: seconds between plain progress lines.
        stream: where progress goes; stderr by default.
        patience: seconds that a round waits for a sink that hangs, once.
        trackers: of others, by name, that are told the same numbers (`fedasr.training.trackers`).
        config: of the run, for them.

    Attributes:
        failures: {sink: what was wrong first}.
      kept: records of before that the run will not repeat.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_round: int | None = None,
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        interval: float = 10.0,
        stream: TextIO | None = None,
        patience: float = 10.0,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self.failures: dict[str, str] = {}
        self.kept: list[dict[str, Any]] = []
        self._to_terminal = Sink("progress", self.failed, patience)
        self._to_file = Sink(METRICS_FILE, self.failed, patience)
        # Events may come late: nobody looks at them between two rounds.
        self._to_tensorboard = Sink("TensorBoard", self.failed, 0)
        self._trackers: dict[str, tuple[Sink, Told]] = {}
        for name in trackers:
            sink = Sink(name, self.failed, 0)  # networks may be slow: nobody waits
            self._trackers[name] = sink, Told(name, workdir, config or {})
        self._file = _LineFile(workdir / METRICS_FILE)
        self._logged: set[tuple[str, Any]] = set()
        self._tensorboard = workdir / TENSORBOARD_FOLDER if tensorboard else None
        self._resumed = {"seed": resume_step, "federated": resume_round}
        if resume_round is None:
            self._resumed = {"seed": -1, "federated": -1}
        self._events: dict[str, Any] = {}
        self._progress: _Progress | None = None
        self._interval = interval
        self._stream = stream or sys.stderr
        # Last: what fails is said by means of the rest.
        self._to_file(self._keep, workdir, resume_round, resume_step)

    def failed(self, name: str, what: str) -> None:
        """Says, and keeps for the summary, that something is done without."""
        self.failures[name] = what
        if name != "progress":
            self.message(f"warning: {name}: {what}: training goes on without")

    def _keep(self, workdir: Path, round: int | None, step: int | None) -> None:
        """Begins the file anew with the records that the run will not repeat."""
        kept = []
        if round is not None:
            kept = [r for r in read_metrics(workdir) if not _is_after(r, round, step)]
        self._logged.update(_phase_and_number(r) for r in kept)
        self.kept = kept
        _replace(workdir / METRICS_FILE, "".join(json.dumps(to_json(r)) + "\n" for r in kept))

    def start(self, total: int, done: int = 0, phase: str = "federated") -> None:
        """Starts the progress of a phase of `total` rounds (steps), of which `done` are done."""
        self._stop_progress()

        def begin() -> None:
            self._progress = _Progress(phase, total, done, self._interval, self._stream)

        self._to_terminal(begin)

    def round(self, round: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Counts federated round `round` as done, and logs its metrics if given.

        A round that is in the file already is not written again: a resumed run repeats it exactly.
        """
        self._done("federated", round, metrics)

    def step(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Like `round`, for a step of the seed's central training."""
        self._done("seed", step, metrics)

    def message(self, text: str) -> None:
        """Prints a line to the progress stream without tearing the bar."""

        def show() -> None:
            if self._progress is not None:
                self._progress.print(text)
            else:
                print(text, file=self._stream, flush=True)

        self._to_terminal(show)

    def close(self) -> None:
        """Ends the progress and closes the files; may be called twice."""
        self._stop_progress()
        self._to_file(self._file.close)

        def end() -> None:
            while self._events:
                self._events.popitem()[1].close()

        self._to_tensorboard(end)
        for sink, tracker in self._trackers.values():
            sink(tracker.close)
            sink.close(_TRACKER_SECONDS)
        for sink in (self._to_tensorboard, self._to_file, self._to_terminal):
            sink.close()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _done(self, phase: str, number: int, metrics: Mapping[str, Any] | None) -> None:
        record = None
        if metrics is not None:
            counter = "step" if phase == "seed" else "round"
            record = to_json({"phase": phase, counter: number, **metrics})
            if (phase, number) not in self._logged:
                self._logged.add((phase, number))
                self._to_file(self._file.write, json.dumps(record, allow_nan=False) + "\n")
                if self._tensorboard is not None:
                    self._to_tensorboard(self._write_events, phase, number, record)
            for sink, tracker in self._trackers.values():  # they know what they have
                sink(tracker.write, phase, number, _told(record))
        self._to_terminal(self._advance, number, record)

    def _advance(self, number: int, record: Mapping[str, Any] | None) -> None:
        if self._progress is not None:
            self._progress.advance(number, record)

    def _write_events(self, phase: str, number: int, record: Mapping[str, Any]) -> None:
        if self._tensorboard is None:
            return
        if phase not in self._events:
            # TensorBoard hides the events of a folder from purge_step on: they are repeated.
            last = self._resumed[phase]
            try:
                self._events[phase] = _Events(self._tensorboard / phase, last)
            except ImportError:
                logging.warning("no TensorBoard events: install tensorboardX to have them")
                self._tensorboard = None
                return
        self._events[phase].write(number, _told(record))

    def _stop_progress(self) -> None:
        def stop() -> None:
            if self._progress is not None:
                self._progress.close()
                self._progress = None

        self._to_terminal(stop)


class _LineFile:
    """Appends whole lines: what a full disk took a part of is cut off again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def write(self, line: str) -> None:
        removed = self._file is not None and not os.fstat(self._file.fileno()).st_nlink
        if removed:
            self.close()
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        self._append(line)
        if removed:
            raise OSError(f"{self._path} was removed while the run wrote to it; it begins anew")

    def _append(self, line: str) -> None:
        data, before = line.encode(), self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
        except OSError:
            self._file.truncate(before)
            raise
        if written != len(data):
            self._file.truncate(before)
            raise OSError(f"{self._path} takes no more: the disk is full")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Events:
    """TensorBoard events of one folder, written at once and not by one more thread.

    tensorboardX's own `SummaryWriter` has a thread that an error of the disk ends; what is put into
    its queue then blocks for ever.

    Args:
        folder: made if missing.
        last: number of the last record that the run will not repeat; None if none is repeated.

    Raises:
        ImportError: tensorboardX is missing.
    """

    def __init__(self, folder: Path, last: int | None) -> None:
        import tensorboardX
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = tensorboardX.event_file_writer.EventsWriter(str(folder / "events"))
        if last is not None:
            log = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=last + 1, file_version="brain.Event:2"))
            self._writer.write_event(Event(step=last + 1, session_log=log))

    def write(self, number: int, values: Mapping[str, float]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        for tag, value in values.items():
            event = Event(step=number, wall_time=time.time(), summary=summary.scalar(tag, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError:
            # Lets go of what the disk has not taken: Python would try it again at its end.
            with contextlib.suppress(OSError):
                self._writer._py_recordio_writer.close()
            raise


def _phase_and_number(record: Mapping[str, Any]) -> tuple[str, Any]:
    """("seed", step) or ("federated", round) of a record of `metrics.jsonl`."""
    if record.get("phase") == "seed":
        return "seed", record.get("step")
    return "federated", record.get("round")


def _is_after(record: Mapping[str, Any], round: int, step: int | None) -> bool:
    phase, number = _phase_and_number(record)
    last = step if phase == "seed" else round
    return isinstance(number, int) and last is not None and number > last


def _told(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, without the one that counts it."""
    return {name: value for name, value in _numbers(record) if name not in ("round", "step")}


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not key.endswith(_INFINITE):
            yield f"{prefix}{key}", float(value)


class _Progress:
    """A rich bar on a terminal, a plain line every `interval` seconds elsewhere."""

    def __init__(self, phase: str, total: int, done: int, interval: float, stream: TextIO):
        self._phase, self._total, self._done = phase, total, done
        self._unit = "rounds" if phase == "federated" else "steps"
        self._interval, self._stream = interval, stream
        # The rate over the last rounds forgets the compilation of the first.
        self._printed = time.monotonic()
        self._times = deque([(self._printed, done)], maxlen=30)
        self._shown: dict[str, str] = {}
        self._bar = self._task = None
        if stream.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[status]}", markup=False),
                console=Console(file=stream),
            )
            self._task = self._bar.add_task(phase, total=total, completed=done, status="")
            self._bar.start()

    def advance(self, done: int, record: Mapping[str, Any] | None) -> None:
        now = time.monotonic()
        self._done = done
        self._times.append((now, done))
        self._remember(record or {})
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, status=self._status())
        elif now - self._printed >= self._interval or done >= self._total:
            self._printed = now
            self.print(f"{self._phase} {done}/{self._total}  {self._status()}")

    def print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _remember(self, record: Mapping[str, Any]) -> None:
        if isinstance(record.get("loss"), int | float):
            self._shown["loss"] = f"{record['loss']:.3f}"
        for split, values in (record.get("eval") or {}).items():
            if isinstance(values.get("wer"), int | float):
                self._shown[f"{split} WER"] = f"{values['wer']:.1f}%"

    def _status(self) -> str:
        (first, start), (last, end) = self._times[0], self._times[-1]
        parts = []
        if end > start and last > first:
            rate = (end - start) / (last - first)
            one = self._unit.removesuffix("s")
            speed = f"{rate:.2f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{one}"
            parts += [speed, f"{_duration((self._total - end) / rate)} left"]
        parts += [f"{name} {value}" for name, value in self._shown.items()]
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
