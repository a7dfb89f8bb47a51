"""TED-LIUM (openslr.org/7, 19, 51) as a source: recordings, and STM files that cut and write them.

    ROOT/{train,dev,test}/stm/TALK.stm    TALK CHANNEL USER START END <LABELS> TRANSCRIPT
    ROOT/{train,dev,test}/sph/TALK.sph    (or .wav, .flac, .mp3, beside the STM or in sph/ or wav/)

The split is the folder's name.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from fedasr.data.recordings import AUDIO_ENDINGS, Recording
from fedasr.data.sources.files import read_text, split_of, walk
from fedasr.data.sources.source import Listed, SourceOptions
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

_IGNORED = "ignore_time_segment_in_scoring"
# Sounds that are no words, and which of several pronunciations was heard.
_MARKS = re.compile(r"\{[^{}]*\}|\(\d+\)")
_FOLDERS = (".", "..", "../sph", "../wav", "../flac", "sph", "wav")


def detect(path: Path) -> bool:
    """Whether STM files lie in this folder, or not far below it."""
    return path.is_dir() and any(
        next(path.glob(pattern), None) for pattern in ("*.stm", "*/*.stm", "*/*/*.stm")
    )


def open_source(path: Path, options: SourceOptions) -> Listed:
    """Reads all STM files below a folder.

    What cannot be used is a `Rejected`: "bad_line", "not_transcribed" (to be ignored, by its own
    words), "missing_audio", and what cannot be visited, see `fedasr.data.sources.files.walk`.

    Raises:
      UserError: there is none.
    """
    unvisited: dict[str, Rejected] = {}
    files = list(walk(path, unvisited)) if path.is_dir() else []
    listings = [file for file in files if file.suffix.lower() == ".stm"]
    if not listings:
        raise UserError(
            f"{path} is not TED-LIUM: give a folder with STM files, such as its release"
        )
    items: list[Utterance | Rejected] = list(unvisited.values())
    used: set[Any] = set()
    notes = {"marks_left_out": 0}
    for listing in listings:
        folder = listing.parent.parent if listing.parent.name == "stm" else listing.parent
        for number, line in read_text(listing):
            where = f"{listing.name} line {number}"
            item = _item(line, where, listing, split_of(folder.name), notes)
            if item is not None:
                items.append(item)
            if isinstance(item, Utterance) and isinstance(item.audio, Recording):
                used.add(item.audio.file)
    sounds = {os.path.realpath(file) for file in files if file.suffix.lower() in AUDIO_ENDINGS}
    notes["recordings_without_lines"] = len(sounds - used)
    return Listed(f"TED-LIUM {path}", items, {k: n for k, n in notes.items() if n})


def _item(
    line: str | None, where: str, listing: Path, split: str | None, notes: dict[str, int]
) -> Utterance | Rejected | None:
    """What a line of an STM file stands for; None for a comment."""
    if line is None:
        return Rejected(where, "bad_line", "not UTF-8")
    if line.startswith(";;"):
        return None
    try:
        talk, channel, user, begin, end, *rest = line.split(maxsplit=5)
        start, stop = float(begin), float(end)
        if not (0 <= start < stop and math.isfinite(stop)):
            raise ValueError
    except ValueError:
        return Rejected(where, "bad_line", line)
    text = rest[0] if rest else ""
    labels, closed, words = text.partition(">")
    text = words.strip() if text.startswith("<") and closed and "," in labels else text
    id = f"{talk}-{round(start * 100):07d}-{round(stop * 100):07d}"
    if text == _IGNORED:
        return Rejected(id, "not_transcribed", where)
    file = _recording(listing, talk)
    if file is None:
        return Rejected(id, "missing_audio", f"no recording of {talk!r} ({where})")
    text, marks = _MARKS.subn(" ", text)
    notes["marks_left_out"] += marks
    # "that 's" is one word, written as two.
    text = re.sub(r" (?='(?:s|t|d|m|re|ve|ll)\b)", "", " ".join(text.split()))
    part = Recording(file, start, stop, channel=_channel(channel))
    return Utterance(id, user, text, split, part)


def _channel(name: str) -> int | None:
    """Which channel a name means, from 0; None for the first or only one."""
    number = {"A": 0, "B": 1}.get(name)
    if number is None and name.isdigit() and int(name) > 1:
        number = int(name) - 1
    return number or None


def _recording(listing: Path, talk: str) -> str | None:
    for folder in _FOLDERS:
        for ending in AUDIO_ENDINGS:
            for spelled in (ending, ending.upper()):
                path = listing.parent / folder / (talk + spelled)
                if path.is_file():
                    return os.path.realpath(path)
    return None
