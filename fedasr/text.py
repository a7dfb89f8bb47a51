"""Text as the recogniser writes it: normalisation by language and the character tokenizer.

The alphabet is the paper's (arXiv 2310.00098): a-z, space, apostrophe and hyphen, beside the CTC
blank; text is lower-cased, letters are transliterated to ASCII (é to e, ß to ss, ä to a), other
punctuation is removed. With `keep_letters` a language's own letters stay, after the paper's.

Letters are transliterated by anyascii: its tables agree with Unidecode's, which the paper used, on
the letters of these languages, and its licence (ISC) suits this package where Unidecode's (GPL)
does not.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from fedasr.errors import UserError

CHARACTERS = "abcdefghijklmnopqrstuvwxyz '-"

# The letters beside a-z that each language spells its own words with.
_LETTERS = {
    "en": "",
    "de": "äöüß",
    "es": "áéíñóúü",
    "fr": "àâæçèéêëîïôùûüÿœ",
    "it": "àèéìíîòóùú",
    "nl": "àáâäèéêëíïóôöúûü",
    "pt": "àáâãçéêíóôõúü",
}
LANGUAGES = tuple(_LETTERS)

_APOSTROPHES_AND_DASHES = dict.fromkeys(
    "\u2018\u2019\u201b\u02bc\u02bb\u2032\uff07`\u00b4", "'"
) | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63\uff0d", "-")
# Where these stand between two words without a space, leaving them out would join the words.
_SEPARATORS = frozenset("\u2014\u2015\u2026/\\|")
_DOTS = re.compile(r"\.{2,}")
# Unicode calls these punctuation, but they are read aloud: losing them would lose words.
_SPOKEN_SIGNS = frozenset("&%@#§‰")


def alphabet(language: str = "en", keep_letters: bool = False) -> str:
    """The characters that transcripts of a language are written with, CTC blank aside.

    Args:
      language: one of `LANGUAGES`.
      keep_letters: add the language's own letters (after the 29, whose ids stay as they are).

    Raises:
      UserError: an unsupported language.
    """
    if language not in _LETTERS:
        raise UserError(f"language {language!r} is not supported: use one of {LANGUAGES}")
    return CHARACTERS + (_LETTERS[language] if keep_letters else "")


def _transliterated(letter: str) -> str | None:
    """A Latin letter in lower-case ASCII letters, None for anything else."""
    # Letters of other scripts are not transliterated: how they are read aloud is not known.
    if not unicodedata.name(letter, "").startswith("LATIN "):
        return None
    from anyascii import anyascii  # only texts with such letters pay for it

    ascii_letters = anyascii(letter).lower()
    fits = ascii_letters and all("a" <= c <= "z" for c in ascii_letters)
    return ascii_letters if fits else None


@functools.lru_cache(maxsize=4096)
def _fold(character: str, characters: str) -> str | None:
    """The lower-case form of one character within the alphabet; None if there is none."""
    if len(lowered := character.lower()) == 1 and lowered in characters:
        return lowered
    if character in _SEPARATORS:
        return " "
    folded = []
    whole = _APOSTROPHES_AND_DASHES.get(character, character)
    for c in unicodedata.normalize("NFKD", whole).lower():
        category = unicodedata.category(c)
        c = _APOSTROPHES_AND_DASHES.get(c, c)
        if c in CHARACTERS:
            folded.append(c)
        elif c.isspace() or category[0] == "Z" or c in _SEPARATORS:
            folded.append(" ")
        elif category[0] == "L" and (letters := _transliterated(c)):
            folded.append(letters)
        elif c in _SPOKEN_SIGNS or category[0] not in "PMC" or category in ("Cn", "Co", "Cs"):
            return None
    return "".join(folded)


def normalize_text(text: str, language: str = "en", keep_letters: bool = False) -> tuple[str, int]:
    """Lower-cases, writes the text in the language's alphabet, and counts what is lost.

    Latin letters outside the alphabet are transliterated (é to e, ß to ss), typographic apostrophes
    and hyphens become ASCII; long dashes, slashes and dots in a row separate words; other
    punctuation, control characters and words without a letter (a lone dash) are removed, and runs
    of white space become one space. Digits, other symbols (& % @ # included: they are read aloud)
    and letters of other scripts cannot be represented: they are left out and counted.

    Args:
      text: any text.
      language: one of `LANGUAGES`.
      keep_letters: keep the language's own letters; accents of other languages still go.

    Returns:
      The normalised text, without spaces at its ends, and the number of characters of `text` that
      could not be represented.

    Raises:
      UserError: an unsupported language.
    """
    characters = alphabet(language, keep_letters)
    if keep_letters:
        text = unicodedata.normalize("NFC", text)  # a letter and its combining accent are one
    folded = [_fold(c, characters) for c in _DOTS.sub(" ", text)]
    words = "".join(f for f in folded if f).split()
    return " ".join(w for w in words if w.strip("'-")), folded.count(None)


class CharTokenizer:
    """Characters to ids: 0 is the CTC blank, then the alphabet in its order.

    By default 1..26 are a-z, 27 space, 28 apostrophe, 29 hyphen.

    Attributes:
      characters: the alphabet. vocab_size: its size and the blank. blank: the blank's id, 0.

    Raises:
      UserError: a character twice in the alphabet, or none at all.
    """

    blank: ClassVar[int] = 0

    def __init__(self, characters: str = CHARACTERS) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise UserError(f"the alphabet {characters!r} must hold characters, each once")
        self.characters = characters
        self.vocab_size = len(characters) + 1
        self._ids = {c: i for i, c in enumerate(characters, start=1)}

    def encode(self, text: str, pad_space: bool = False) -> np.ndarray:
        """The ids of normalised text.

        Args:
          text: characters of the alphabet only, as `normalize_text` returns them.
          pad_space: put a space on both sides, as the paper's targets have.

        Returns:
          int32 [characters], each in 1..vocab_size - 1.

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
          ids: integers in 0..vocab_size - 1.

        Raises:
          ValueError: an id out of range.
        """
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if ((ids < 0) | (ids >= self.vocab_size)).any():
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}")
        return "".join(self.characters[i - 1] for i in ids if i != self.blank).strip()


def tokenizer_for(metadata: Mapping[str, Any]) -> CharTokenizer:
    """The tokenizer that wrote a prepared corpus's labels.

    Args:
      metadata: of `fedasr.data.corpus.read_metadata`; `options.characters` is the alphabet.

    Raises:
      UserError: the metadata names no alphabet.
    """
    characters = metadata.get("options", {}).get("characters")
    if not isinstance(characters, str):
        raise UserError("the corpus does not say its alphabet (options.characters): prepare again")
    return CharTokenizer(characters)
