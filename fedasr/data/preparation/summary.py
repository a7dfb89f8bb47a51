"""What became of the inputs of a preparation, in numbers and in words."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedasr import text as text_lib
from fedasr.data import identity
from fedasr.data.preparation.parts import Row, Skipped

SKIPPED_FILE = "skipped.jsonl"
_SHOWN = 20  # kinds of unknown characters in a summary


@dataclasses.dataclass
class Inputs:
    """What became of all inputs.

    Attributes:
      rows: those that are stored. users: all that the input names. skipped: counts by reason,
      sorted. examples: one "id: detail" for each reason. again: (recording, named split, user) of
      those skipped because their file and transcript are stored already. renamed: users' ids that
      were not as they are stored.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    users: set[str] = dataclasses.field(default_factory=set)
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    again: list[tuple[str, str | None, str]] = dataclasses.field(default_factory=list)
    renamed: set[str] = dataclasses.field(default_factory=set)


def accepted(items: Iterable[Row | Skipped], skipped_file: IO[str]) -> Inputs:
    """Takes in what became of each input, and lists what is left out."""
    inputs = Inputs()
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    stored: dict[str, Row] = {}  # by file and transcript
    for item in items:
        if item.user is not None:
            inputs.users.add(item.user)
            if spelling := getattr(item, "spelling", None):
                inputs.renamed.add(spelling)
            # Only an id that was stored is taken: one that failed may still come with good audio.
            if item.id in seen and getattr(item, "reason", None) != "bad_split":
                item = Skipped(item.id, item.user, "duplicate_id", "")
        if isinstance(item, Row) and item.file is not None:
            first = stored.setdefault(item.file, item)
            if first is not item:
                inputs.again.append((first.recording or "", item.split, item.user))
                same = f"the same file and transcript as {first.id!r} of {first.user!r}"
                item = Skipped(item.id, item.user, "duplicate_recording", same)
        if isinstance(item, Row):
            seen.add(item.id)
            inputs.rows.append(item)
            continue
        skipped[item.reason] += 1
        inputs.examples.setdefault(item.reason, f"{item.id}: {item.detail}".rstrip(": "))
        line = {"id": item.id, "reason": item.reason, "detail": item.detail}
        skipped_file.write(json.dumps(line) + "\n")
    inputs.skipped = dict(sorted(skipped.items()))
    inputs.examples = dict(sorted(inputs.examples.items()))
    return inputs


def nothing_stored(inputs: Inputs, out: Path) -> str:
    """One line that says why, with an example and where the rest is."""
    if not inputs.skipped:
        return "no utterance could be stored (no input): mend the source"
    counts = ", ".join(f"{n} {reason}" for reason, n in inputs.skipped.items())
    if "unknown_characters" in inputs.skipped:
        counts += f": {describe_unknown(unknown_characters(out / SKIPPED_FILE))}"
    most = max(inputs.skipped, key=inputs.skipped.__getitem__)
    return (
        f"no utterance could be stored ({counts}); for example {inputs.examples[most]} "
        f"(all are listed in {out / SKIPPED_FILE}): mend the source"
    )


@dataclasses.dataclass
class _Sound:
    """Where one recording is stored: in which splits, of which users, with which transcripts."""

    splits: set[str] = dataclasses.field(default_factory=set)
    users: set[str] = dataclasses.field(default_factory=set)
    texts: set[str] = dataclasses.field(default_factory=set)
    copies: int = 0


def _sounds(inputs: Inputs, by_split: Mapping[str, Mapping[str, Sequence[Row]]]) -> list[_Sound]:
    """Every recording once, however often it is stored."""
    found: dict[str, _Sound] = {}
    for split, by_user in by_split.items():
        for row in (row for rows in by_user.values() for row in rows):
            if row.recording is not None:
                sound = found.setdefault(row.recording, _Sound())
                sound.splits.add(split)
                sound.users.add(row.user)
                sound.texts.add(row.transcript)
                sound.copies += 1
    for recording, named, user in inputs.again:
        found[recording].users.add(user)
        if named is not None:
            found[recording].splits.add(named)
    return list(found.values())


def worth_a_look(
    inputs: Inputs, by_split: Mapping[str, Mapping[str, Sequence[Row]]]
) -> dict[str, int]:
    """Counts of what is stored but worth a look; those that are 0 are left out."""
    sounds = _sounds(inputs, by_split)
    counts = {
        "saturated_utterances": sum(row.saturated for row in inputs.rows),
        "utterances_with_decoder_complaints": sum(row.complaints > 0 for row in inputs.rows),
        "decoder_complaints": sum(row.complaints for row in inputs.rows),
        "recordings_stored_several_times": sum(sound.copies > 1 for sound in sounds),
        "recordings_in_several_splits": sum(len(sound.splits) > 1 for sound in sounds),
        "recordings_of_several_users": sum(len(sound.users) > 1 for sound in sounds),
        "recordings_with_several_transcripts": sum(len(sound.texts) > 1 for sound in sounds),
        "user_ids_normalised": len(inputs.renamed),
        "users_differing_by_case_only": identity.case_variants({row.user for row in inputs.rows}),
    }
    return {name: count for name, count in counts.items() if count}


def unknown_characters(path: Path) -> list[list[Any]]:
    """What made transcripts unusable, most frequent first: [characters, reason, count]."""
    counts: Counter[tuple[str, str]] = Counter()
    with open(path, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["reason"] == "unknown_characters":
                counts += text_lib.parse_losses(line["detail"])
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[shown, reason, count] for (shown, reason), count in ordered[:_SHOWN]]


def describe_unknown(unknown: Sequence[Sequence[Any]]) -> str:
    """One line: which characters, how often, and for each kind what keeps them."""
    shown = ", ".join(f"{characters} {count}x" for characters, _, count in unknown[:10])
    reasons = dict.fromkeys(reason for _, reason, _ in unknown)
    return f"{shown} ({'; '.join(f'{r}: {text_lib.REASONS[r]}' for r in reasons)})"


def extent(rows: Iterable[Row]) -> dict[str, Any]:
    """Users, utterances, hours, and minutes per user of some rows."""
    seconds: dict[str, float] = {}
    utterances = 0
    for row in rows:
        seconds[row.user] = seconds.get(row.user, 0.0) + row.seconds
        utterances += 1
    minutes = np.asarray(list(seconds.values())) / 60
    statistics: dict[str, Callable[[np.ndarray], Any]]
    statistics = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    return {
        "users": len(seconds),
        "utterances": utterances,
        "hours": round(float(minutes.sum()) / 60, 6),
        "minutes_per_user": {name: round(float(of(minutes)), 4) for name, of in statistics.items()},
    }
