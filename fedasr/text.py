"""Text as the recogniser writes it: normalisation and the character tokenizer.

The alphabet is the paper's (arXiv 2310.00098): a-z, space, apostrophe and hyphen, beside the CTC
blank; text is lower-cased, accents are folded to ASCII, other punctuation is removed.
"""

import functools
import unicodedata
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from fedasr.errors import UserError

CHARACTERS = "abcdefghijklmnopqrstuvwxyz '-"

_LANGUAGES = ("en",)

# What Unicode decomposition alone does not fold to ASCII.
_FOLDS = (
    dict.fromkeys("\u2018\u2019\u201b\u02bc\u02bb\u2032\uff07`\u00b4", "'")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-")
    | {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "þ": "th"}
    | {"đ": "d", "ð": "d", "ł": "l", "\u0131": "i"}
)
# Unicode calls these punctuation, but they are read aloud: losing them would lose words.
_SPOKEN_SIGNS = frozenset("&%@#§‰")


@functools.lru_cache(maxsize=4096)
def _fold(character: str) -> str | None:
    """The lower-case form of one character within the alphabet; None if there is none."""
    folded = []
    for c in unicodedata.normalize("NFKD", _FOLDS.get(character, character)).lower():
        category = unicodedata.category(c)
        c = _FOLDS.get(c, c)
        if all(letter in CHARACTERS for letter in c):
            folded.append(c)
        elif c.isspace() or category[0] == "Z":
            folded.append(" ")
        elif c in _SPOKEN_SIGNS or category[0] not in "PMC" or category in ("Cn", "Co", "Cs"):
            return None
    return "".join(folded)


def normalize_text(text: str, language: str = "en") -> tuple[str, int]:
    """Lower-cases, folds to the alphabet a-z, space, apostrophe, hyphen, and counts what is lost.

    Accents are folded (é to e, ß to ss), typographic apostrophes and dashes become ASCII, other
    punctuation, control characters and words without a letter (a lone dash) are removed, and
    runs of white space become one space. Digits, other symbols (& % @ # included: they are read
    aloud) and letters of other scripts cannot be represented: they are left out and counted.

    Args:
      text: any text.
      language: only "en" so far.

    Returns:
      The normalised text, without spaces at its ends, and the number of characters of `text` that
      could not be represented.

    Raises:
      UserError: an unsupported language.
    """
    if language not in _LANGUAGES:
        raise UserError(f"language {language!r} is not supported: use one of {_LANGUAGES}")
    folded = [_fold(c) for c in text]
    words = "".join(f for f in folded if f).split()
    return " ".join(w for w in words if w.strip("'-")), folded.count(None)


class CharTokenizer:
    """Characters to ids: 0 is the CTC blank, 1..26 are a-z, 27 space, 28 apostrophe, 29 hyphen."""

    blank: ClassVar[int] = 0
    vocab_size: ClassVar[int] = len(CHARACTERS) + 1

    _ids: ClassVar[dict[str, int]] = {c: i for i, c in enumerate(CHARACTERS, start=1)}

    def encode(self, text: str, pad_space: bool = False) -> np.ndarray:
        """The ids of normalised text.

        Args:
          text: characters of the alphabet only, as `normalize_text` returns them.
          pad_space: put a space on both sides, as the paper's targets have.

        Returns:
          int32 [characters], each in 1..29.

        Raises:
          UserError: a character outside the alphabet.
        """
        if pad_space:
            text = f" {text} "
        try:
            return np.array([self._ids[c] for c in text], np.int32)
        except KeyError as error:
            raise UserError(
                f"character {error.args[0]!r} is not in the alphabet: use normalize_text first"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without spaces at its ends; blanks (also used as padding) are skipped.

        Args:
          ids: integers in 0..29.

        Raises:
          ValueError: an id out of range.
        """
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if ((ids < 0) | (ids >= self.vocab_size)).any():
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}")
        return "".join(CHARACTERS[i - 1] for i in ids if i != self.blank).strip()
