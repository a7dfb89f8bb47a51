"""Neural recordings as a source: sentences of all days, z-scored by block."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data.neural import tfrecords
from fedasr.data.neural.areas import SPEECH_AREAS, Area
from fedasr.data.neural.arrays import load_array, manifest_sentence, read_lines
from fedasr.data.neural.competition import SPLITS, Sentence, read_day
from fedasr.data.neural.scores import BlockReport, z_score_block
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

BIN_SECONDS = 0.02
MAX_BROKEN = 0.25  # a sentence with NaN in more of its channels is left out


class NeuralSessions:
    """Sentences of all days, as `fedasr.data.preparation.prepare.prepare_with` takes them.

    Iterating reads one day at a time. Sentences that cannot be used come out as `Rejected`:
    "wrong_shape", "non_finite_channels" (NaN in more than a quarter of the channels) and
    "bad_manifest_line". The converter adds its own reasons, such as "empty_text".

    Args:
      path: the folder of the competition layout, or of CORP's release (`tfrecords`), or a manifest
        (.jsonl).
      areas: channels to use; None for the speech motor area of the competition, or for all channels
        of the others.

    Attributes:
      channels: of every sentence.
      name, fingerprint, total: as `prepare_with` takes them.
      notes: counts, complete once all is read: "nan_channels" and "constant_channels", pairs of a
        channel and a block in which it was set to zero.
      broken: {"SPLIT/DAY block B": {"nan": [...], "constant": [...]}}, the same by name.

    Raises:
      UserError: nothing to read there; while iterating: see `read_day`.
    """

    def __init__(self, path: str | os.PathLike[str], areas: Sequence[Area] | None = None) -> None:
        self.path = Path(path)
        self.notes: dict[str, int] = {}
        self.broken: dict[str, dict[str, list[int]]] = {}
        self.total: int | None = None
        self._lines: list[dict[str, Any] | Rejected] = []
        self._records: list[tuple[str, str, str, list[Path]]] = []
        self._files = [
            (file, split) for split in SPLITS for file in sorted(self.path.glob(f"{split}/*.mat"))
        ]
        self.areas: tuple[Area, ...] | None = tuple(areas) if areas else None
        seen = self._look()
        self.channels = self._channels()
        self.name = f"neural recordings {path}"
        told = json.dumps([list(map(_state, seen)), self.areas])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def _look(self) -> list[Path]:
        """Finds out what there is to read; returns the files that it lies in."""
        if self._files:
            self.areas = self.areas or SPEECH_AREAS
            return [file for file, _ in self._files]
        if self.areas and any(area.field != "features" for area in self.areas):
            raise UserError("areas of a manifest or of records are written as features[0:192]")
        if self.path.is_dir():
            self._records = tfrecords.find_sessions(self.path)
            if not self._records:
                raise UserError(
                    f"{self.path} has no MATLAB files in {', '.join(SPLITS)}, and no folders of "
                    "sessions with .tfrecord files"
                )
            return [file for *_, files in self._records for file in files]
        self._lines = read_lines(self.path)
        self.total = len(self._lines)
        named = {line["features"] for line in self._lines if not isinstance(line, Rejected)}
        return [self.path, *(self.path.parent / name for name in sorted(named))]

    def _channels(self) -> int:
        """Of the areas, or of the first sentence."""
        if self.areas is not None:
            return sum(area.stop - area.start for area in self.areas)
        for *_, files in self._records:
            return tfrecords.channels_of(files[0])
        for line in self._lines:
            if not isinstance(line, Rejected):
                array = load_array(self.path.parent / line["features"], line.get("array"))
                return int(array.shape[-1]) if array.ndim else 0
        return 0

    def __iter__(self) -> Iterator[Utterance | Rejected]:
        self.broken.clear()
        self.notes.clear()
        for file, split in self._files:
            yield from self._day(file.stem, read_day(file, split, self.areas or SPEECH_AREAS))
        for day, split, scale, files in self._records:
            yield from self._day(day, tfrecords.read_session(day, split, files, self.areas), scale)
        yield from (line for line in self._lines if isinstance(line, Rejected))
        lines = [line for line in self._lines if not isinstance(line, Rejected)]
        for session in sorted({line["session"] for line in lines}):
            yield from self._day(session, self._read_session(lines, session))

    def _day(
        self, day: str, sentences: Sequence[Sentence], scale: str = "block"
    ) -> Iterator[Utterance | Rejected]:
        groups: dict[tuple[str, str], list[int]] = {}
        ready: list[Utterance | Rejected] = []
        for i, one in enumerate(sentences):
            reason, detail = one.reason, one.detail
            if one.signal is not None:
                bad = np.flatnonzero(~np.isfinite(one.signal).all(axis=0))
                channels = one.signal.shape[1]
                if channels != self.channels:
                    reason, detail = "wrong_shape", f"{channels} channels, not {self.channels}"
                elif len(bad) > MAX_BROKEN * channels:
                    reason = "non_finite_channels"
                    detail = f"{len(bad)} of {channels} channels, such as {bad[:8].tolist()}"
                else:
                    groups.setdefault((one.split, one.block), []).append(i)
            ready.append(Rejected(one.id, reason, detail))
        for (split, block), group in groups.items():
            recorded = [x for i in group if (x := sentences[i].signal) is not None]
            if scale == "block":
                signals, report = z_score_block(recorded)
                self._report(f"{split}/{day} block {block}", report)
            else:
                # A few channels that are NaN: zero, as those of a block are.
                signals = [np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in recorded]
                if scale == tfrecords.ROLLING:
                    signals = tfrecords.rolling_z_scores(signals)
            for i, signal in zip(group, signals, strict=True):
                one, read = sentences[i], functools.partial(_recorded, signal)
                ready[i] = Utterance(one.id, day, one.text, one.split, read)
        yield from ready

    def _report(self, where: str, report: BlockReport) -> None:
        named = {"nan": list(report.not_finite), "constant": list(report.constant)}
        if not any(named.values()):
            return
        self.broken[where] = named
        for kind, channels in named.items():
            if channels:
                key = f"{kind}_channels"
                self.notes[key] = self.notes.get(key, 0) + len(channels)
        if named["nan"]:
            logging.getLogger(__name__).warning("%s: channels %s hold NaN", where, named["nan"])

    def _read_session(self, lines: Sequence[dict[str, Any]], session: str) -> list[Sentence]:
        sentences = []
        held: tuple[Any, Any] = (None, None)
        for line in lines:
            if line["session"] != session:
                continue
            where = self.path.parent / line["features"], line.get("array")
            if held[0] != where:
                held = where, load_array(*where)
            signal, problem = manifest_sentence(held[1], line, self.areas)
            sentences.append(
                Sentence(
                    line["id"],
                    line["text"],
                    str(line.get("block", "")),
                    line["split"],
                    signal,
                    "wrong_shape" if problem else "",
                    problem,
                )
            )
        return sentences


def _state(file: Path) -> list[str | int]:
    """What tells that a file has changed."""
    if not file.is_file():
        return [str(file)]
    stat = file.stat()
    return [str(file), stat.st_size, stat.st_mtime_ns]


def _recorded(signal: np.ndarray) -> tuple[np.ndarray, float]:
    return signal, 1.0 / BIN_SECONDS
