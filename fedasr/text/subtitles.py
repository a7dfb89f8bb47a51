"""SubRip subtitles (.srt) of words with times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CHARACTERS, SECONDS, PAUSE = 42, 6.0, 1.0  # of a cue at most; a pause ends it, too


def srt(words: Iterable[Any]) -> str:
    """Numbered cues of a few words each.

    Args:
      words: have `word`, `start` and `end` (seconds); those without times are left out.
    """
    cues: list[list[Any]] = []
    for word in words:
        if word.start is None:
            continue
        if not cues or _ends(cues[-1], word):
            cues.append([])
        cues[-1].append(word)
    return "".join(
        f"{i}\n{_time(cue[0].start)} --> {_time(cue[-1].end)}\n"
        f"{' '.join(word.word for word in cue)}\n\n"
        for i, cue in enumerate(cues, start=1)
    )


def _ends(cue: list[Any], word: Any) -> bool:
    """Whether a word has no room in a cue."""
    characters = sum(len(one.word) + 1 for one in cue) + len(word.word)
    pause, seconds = word.start - cue[-1].end, word.end - cue[0].start
    return characters > CHARACTERS or pause > PAUSE or seconds > SECONDS


def _time(seconds: float) -> str:
    """Hours, minutes, seconds and milliseconds."""
    whole = round(1000 * seconds)
    minutes, milliseconds = divmod(whole, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"
