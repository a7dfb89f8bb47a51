"""Text as the recogniser writes it: normalisation by language and the character tokenizer.

The alphabet is the paper's (arXiv 2310.00098): a-z, space, apostrophe and hyphen, beside the CTC
blank; text is lower-cased, letters are transliterated to ASCII (é to e, ß to ss, ä to a), other
punctuation is removed. With `keep_letters` a language's own letters stay, after the paper's.

Letters are transliterated by anyascii: its tables agree with Unidecode's, which the paper used, on
the letters of these languages, and its licence (ISC) suits this package where Unidecode's (GPL)
does not.
"""

import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
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

# Of CMUdict, without stress; silence separates words.
PHONEMES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W "
    "Y Z ZH"
).split()
SILENCE = "SIL"

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


class PhonemeTokenizer:
    """Phonemes to ids: 0 is the CTC blank, 1..39 `PHONEMES`, 40 `SILENCE`, which separates words.

    A text is a sequence of their names with spaces between: what counts words counts phonemes.

    Attributes:
      characters: the names, a list. vocab_size, blank: as of `CharTokenizer`.
    """

    blank: ClassVar[int] = 0

    def __init__(self) -> None:
        self.characters = [*PHONEMES, SILENCE]
        self.vocab_size = len(self.characters) + 1
        self._ids = {name: i for i, name in enumerate(self.characters, start=1)}

    def encode(self, text: str, pad_space: bool = False) -> np.ndarray:
        """The ids of phonemes, int32 [phonemes]; `pad_space` puts silence on both sides.

        Raises:
          UserError: no such phoneme.
        """
        names = text.split()
        if pad_space:
            names = [SILENCE, *names, SILENCE]
        try:
            return np.array([self._ids[name] for name in names], np.int32)
        except KeyError as error:
            raise UserError(f"{error.args[0]!r} is no phoneme of {self.characters}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The names of ids in 0..40, silence at the ends and blanks left out.

        Raises:
          ValueError: an id out of range.
        """
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}")
        names = [self.characters[i - 1] for i in ids if i != self.blank]
        while names and names[-1] == SILENCE:
            names.pop()
        start = next((i for i, name in enumerate(names) if name != SILENCE), 0)
        return " ".join(names[start:])


Tokenizer = CharTokenizer | PhonemeTokenizer


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


def tokenizer_for(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that wrote a prepared corpus's labels.

    Args:
      metadata: of `fedasr.data.corpus.read_metadata`; `options.characters` is the alphabet, a list
        for phonemes.

    Raises:
      UserError: the metadata names no alphabet.
    """
    characters = metadata.get("options", {}).get("characters")
    if characters == PhonemeTokenizer().characters:
        return PhonemeTokenizer()
    if not isinstance(characters, str):
        raise UserError("the corpus does not say its alphabet (options.characters): prepare again")
    return CharTokenizer(characters)
