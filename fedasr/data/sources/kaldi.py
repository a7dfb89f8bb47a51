"""Kaldi data directories (kaldi-asr.org/doc/data_prep.html) as a source.

    DIR/wav.scp      RECORDING PATH, or RECORDING COMMAND |
    DIR/segments     UTTERANCE RECORDING START END, if utterances are parts of recordings
    DIR/text         UTTERANCE TRANSCRIPT
    DIR/utt2spk      UTTERANCE USER
    DIR/spk2gender, DIR/reco2file_and_channel, if there are any

A folder of such directories (train, dev, test ...) has a split for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from fedasr.data.recordings import Command, Recording
from fedasr.data.sources.files import find_file, read_text, split_of
from fedasr.data.sources.source import Listed, SourceOptions
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

_NEEDED = ("wav.scp", "text", "utt2spk")


def detect(path: Path) -> bool:
    """Whether this is a data directory, or a folder of some."""
    return path.is_dir() and bool(_directories(path))


def open_source(path: Path, options: SourceOptions) -> Listed:
    """Reads one or several data directories.

    What cannot be used is a `Rejected`: "bad_line", "duplicate_id", "missing_audio",
    "missing_transcript", "missing_user", and "pipe_refused" for a recording that a command makes,
    unless `options.pipes`.

    Raises:
      UserError: there is none, or one of its files is missing or cannot be read.
    """
    directories = _directories(path) if path.is_dir() else []
    if not directories:
        raise UserError(
            f"{path} is no Kaldi data directory: give a folder with {', '.join(_NEEDED)}, or one "
            "of such folders"
        )
    items: list[Utterance | Rejected] = []
    notes: dict[str, int] = {}
    for directory in directories:
        split = None if directory == path else split_of(directory.name)
        found = _Directory(directory, options)
        items += found.items(split)
        for name, count in found.notes.items():
            notes[name] = notes.get(name, 0) + count
    return Listed(f"Kaldi {path}", items, notes)


def _directories(path: Path) -> list[Path]:
    if (path / "wav.scp").is_file():
        return [path]
    try:
        return sorted(p for p in path.iterdir() if (p / "wav.scp").is_file())
    except OSError:
        return []


class _Directory:
    """One data directory; `rejected` are lines of its files that cannot be used."""

    def __init__(self, folder: Path, options: SourceOptions) -> None:
        if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
            raise UserError(f"{folder} has no {', '.join(missing)}: prepare it for Kaldi first")
        self._folder, self._options = folder, options
        self.rejected: list[Rejected] = []
        self.notes: dict[str, int] = {}
        self._recordings = self._table("wav.scp")
        self._texts = self._table("text", empty=True)
        self._users = self._table("utt2spk")
        self._genders = self._table("spk2gender")
        self._channels = self._table("reco2file_and_channel")
        self._segments = self._table("segments") if (folder / "segments").is_file() else None

    def _table(self, name: str, empty: bool = False) -> dict[str, str]:
        """{first word: rest} of a file's lines; {} where there is no file."""
        path = self._folder / name
        found: dict[str, str] = {}
        for number, line in read_text(path) if path.is_file() else ():
            where = f"{self._folder.name}/{name} line {number}"
            key, _, rest = (line or "").partition("\t" if "\t" in (line or "") else " ")
            if line is None:
                self.rejected.append(Rejected(where, "bad_line", "not UTF-8"))
            elif not rest.strip() and not empty:
                self.rejected.append(Rejected(where, "bad_line", line))
            elif key in found:
                self.rejected.append(Rejected(key, "duplicate_id", where))
            else:
                found[key] = rest.strip()
        return found

    def items(self, split: str | None) -> list[Utterance | Rejected]:
        """All utterances, and what cannot be used, the latter first."""
        utterances = list(self._utterances(split))
        return [*self.rejected, *utterances]

    def _utterances(self, split: str | None) -> Iterator[Utterance]:
        places = self._segments
        if places is None:
            places = {id: id for id in self._recordings}
        used: set[str] = set()
        for id, place in places.items():
            recording, *times = place.split()
            used.add(recording)
            problem, part = self._part(times)
            source = self._recordings.get(recording)
            if problem:
                self.rejected.append(Rejected(id, "bad_line", f"segments: {place} ({problem})"))
            elif source is None:
                self.rejected.append(Rejected(id, "missing_audio", f"no recording {recording!r}"))
            elif id not in self._texts:
                self.rejected.append(Rejected(id, "missing_transcript", place))
            elif id not in self._users:
                self.rejected.append(Rejected(id, "missing_user", place))
            elif source.endswith("|") and not self._options.pipes:
                self.rejected.append(Rejected(id, "pipe_refused", f"{source} (--pipes runs it)"))
            else:
                user = self._users[id]
                gender = self._genders.get(user)
                yield Utterance(
                    id=id,
                    user=user,
                    text=self._texts[id],
                    split=split,
                    audio=Recording(self._file(source), *part, None, self._channel(recording)),
                    metadata={"gender": gender} if gender else {},
                )
        for id in self._texts:
            if id not in places:
                self.rejected.append(Rejected(id, "missing_audio", self._texts[id]))
        if unused := len(set(self._recordings) - used):
            self.notes["recordings_without_segments"] = unused

    def _file(self, source: str) -> str:
        if source.endswith("|"):
            return Command(source[:-1].strip())
        return find_file(self._folder, source)

    def _channel(self, recording: str) -> int | None:
        letter = self._channels.get(recording, "").split()[-1:]
        return {"A": 0, "1": 0, "B": 1, "2": 1}.get(letter[0]) if letter else None

    def _part(self, times: list[str]) -> tuple[str | None, tuple[float, float | None]]:
        """(what is wrong, (start, stop)) of the times in a line of segments."""
        if not times and self._segments is None:
            return None, (0.0, None)
        try:
            start, stop = map(float, times[:2])
        except ValueError:
            return "not two times", (0.0, None)
        end = None if stop == -1 else stop
        if not (math.isfinite(start) and math.isfinite(stop) and start >= 0):
            return "no such times", (0.0, None)
        if end is not None and end <= start:
            return "it ends before it begins", (0.0, None)
        return None, (start, end)
