"""`hypotheses.jsonl`: every evaluated utterance with its alignment, a JSON object a line.

Each line has "split", "user", "utterance" (number among the user's in the split), "reference",
"hypothesis", "frames", "words" {"errors", "total"}, "characters" {"errors", "total"} and
"alignment", a list of [kind, reference word, hypothesis word] with kinds "=", "S", "D" and "I". If
the prepared data says so, also "id", "seconds" and "metadata".
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedasr.errors import UserError
from fedasr.evaluation.alignment import Pair, align, characters_of, errors_of, words_of

HYPOTHESES_FILE = "hypotheses.jsonl"


@dataclass(frozen=True)
class Hypothesis:
    """One utterance as it was recognised.

    Attributes:
      split, user: whose it is. utterance: its number among the user's in that split.
      reference, hypothesis: what was said, and what was recognised.
      frames: of features; 0 if not known.
      id: of the source, "" if not known. seconds: of audio, None if not known.
      metadata: what the source says of it.
    """

    split: str
    user: str
    utterance: int
    reference: str
    hypothesis: str
    frames: int = 0
    id: str = ""
    seconds: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> list[Pair]:
        """The alignment of words."""
        return align(words_of(self.reference), words_of(self.hypothesis))

    def characters(self) -> list[Pair]:
        """The alignment of characters."""
        return align(characters_of(self.reference), characters_of(self.hypothesis))

    def record(self) -> dict[str, Any]:
        """As a line of the file."""
        words = self.words()
        row: dict[str, Any] = {"split": self.split, "user": self.user, "utterance": self.utterance}
        if self.id:
            row["id"] = self.id
        row |= {"reference": self.reference, "hypothesis": self.hypothesis, "frames": self.frames}
        if self.seconds is not None:
            row["seconds"] = self.seconds
        if self.metadata:
            row["metadata"] = dict(self.metadata)
        row["words"] = {"errors": errors_of(words), "total": len(words_of(self.reference))}
        said = characters_of(self.reference)
        row["characters"] = {"errors": errors_of(self.characters()), "total": len(said)}
        row["alignment"] = [list(pair) for pair in words]
        return row


def write_hypotheses(path: str | Path, found: Iterable[Hypothesis]) -> None:
    """Writes the file in one step; an earlier one is replaced.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogatepass") as file:
            for one in found:
                file.write(json.dumps(one.record(), ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def read_hypotheses(path: str | Path, splits: Sequence[str] = ()) -> list[Hypothesis]:
    """Reads the file; a work directory stands for the one in it.

    Args:
      path: of the file or the folder.
      splits: those wanted; () for all.

    Raises:
      UserError: there is none, or a line is no such object.
    """
    path = Path(path)
    path = path / HYPOTHESES_FILE if path.is_dir() else path
    try:
        # Not splitlines: texts may hold what Unicode takes for the end of a line.
        lines = path.read_bytes().decode("utf-8", "surrogatepass").strip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({_reason(error)}): make it with fedasr evaluate "
            "--hypotheses=FILE"
        ) from error
    found = []
    for number, line in enumerate(filter(None, lines), 1):
        try:
            one = _hypothesis(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            what = " ".join(str(error).split())[:80]
            raise UserError(
                f"{path}, line {number}, is no hypothesis ({what}): make the file again with "
                "fedasr evaluate --hypotheses=FILE"
            ) from error
        if not splits or one.split in splits:
            found.append(one)
    return found


def _hypothesis(row: Any) -> Hypothesis:
    if not isinstance(row, Mapping):
        raise TypeError("it is no object")
    texts = {
        key: str(row.get(key, "")) if key in ("split", "id") else row[key]
        for key in ("split", "user", "reference", "hypothesis", "id")
    }
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("a text is missing")
    seconds = row.get("seconds")
    return Hypothesis(
        **texts,
        utterance=int(row.get("utterance", 0)),
        frames=int(row.get("frames", 0)),
        seconds=None if seconds is None else float(seconds),
        metadata={str(k): str(v) for k, v in dict(row.get("metadata") or {}).items()},
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it is not UTF-8"
