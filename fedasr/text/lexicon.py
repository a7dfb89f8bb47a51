"""Pronouncing dictionaries: words in phonemes."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedasr.errors import UserError
from fedasr.text.tokenizers import SILENCE


def read_lexicon(path: str | os.PathLike[str]) -> dict[str, list[tuple[str, ...]]]:
    """Reads a pronouncing dictionary in the form of CMUdict.

    A line holds a word and its phonemes; "WORD(2)" is another pronunciation, stress digits are
    left out, and lines that begin with ";;;" are comments. Words come out in lower case.

    Raises:
      UserError: the file cannot be read, or a line has no phoneme.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:  # as CMUdict 0.7b is
        lines = content.decode("latin-1").splitlines()
    lexicon: dict[str, list[tuple[str, ...]]] = {}
    for number, line in enumerate(lines, start=1):
        if line.startswith(";;;") or not (parts := line.split(" #")[0].split()):
            continue
        word, *phonemes = parts
        if not phonemes:
            raise UserError(f"{path}, line {number}: {word!r} has no phonemes")
        spelling = tuple(p.rstrip("012") for p in phonemes)
        spellings = lexicon.setdefault(re.sub(r"\(\d+\)$", "", word).lower(), [])
        if spelling not in spellings:
            spellings.append(spelling)
    return lexicon


def pronounced(
    text: str, lexicon: Mapping[str, Iterable[tuple[str, ...]]]
) -> tuple[str, list[str]]:
    """A text in phonemes: each word's first pronunciation, silence between.

    Args:
      text: words with spaces between, as `normalize_text` returns them.
      lexicon: of `read_lexicon`.

    Returns:
      The phonemes as `PhonemeTokenizer.encode` takes them, and the words that have none.
    """
    words = text.split()
    if unknown := [word for word in words if word not in lexicon]:
        return "", unknown
    return f" {SILENCE} ".join(" ".join(next(iter(lexicon[word]))) for word in words), []
