"""What a decoder knows of a language: a model, a list of words, and how much they count."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedasr.decoding.beam import BeamConfig
from fedasr.decoding.ngram import NGram
from fedasr.errors import UserError
from fedasr.text import CharTokenizer, Tokenizer

Spellings = dict[str, list[tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """Of a language.

    Attributes:
      model: of its sentences; None for none.
      lexicon: its words; None for those of the model, or for any.
      beam: how they are weighed.
    """

    model: NGram | None = None
    lexicon: frozenset[str] | None = None
    beam: BeamConfig = dataclasses.field(default_factory=BeamConfig)

    def known_words(self) -> frozenset[str] | None:
        """The lexicon, else the model's words; None where there is neither."""
        if self.lexicon is not None or self.model is None:
            return self.lexicon
        return self.model.vocabulary


def characters_of(tokenizer: Tokenizer) -> Sequence[str]:
    """The characters that a tokenizer writes, in the order of their ids from 1.

    Raises:
      UserError: it writes phonemes or pieces of words, or has no space to tell words apart.
    """
    if not isinstance(tokenizer, CharTokenizer) or " " not in tokenizer.characters:
        raise UserError(
            "beam and lexicon decoding are for labels of characters with a space between words: "
            "choose the decoder 'greedy' for phonemes and subwords"
        )
    return tokenizer.characters


def spellings(words: Iterable[str], tokenizer: Tokenizer) -> Spellings:
    """Each word in the characters of an alphabet; those that it cannot write are left out.

    Args:
      words: without spaces.
      tokenizer: of characters.
    """
    found: Spellings = {}
    for word in sorted(set(words)):
        try:
            ids = tokenizer.encode(word)
        except UserError:
            continue
        if len(ids):
            found[word] = [tuple(tokenizer.characters[i - 1] for i in ids)]
    return found


def read_words(path: str | os.PathLike[str]) -> frozenset[str]:
    """The words of a list: the first of each line, in lower case; what follows it is not read.

    So a pronouncing dictionary does, too: its comments (";;;") and "(2)" are left out.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or has no word.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the lexicon {path} cannot be read as UTF-8 text: {error}") from error
    firsts = [line.split()[0] for line in lines if line.strip() and not line.startswith(";;;")]
    words = frozenset(word.partition("(")[0].lower() for word in firsts) - {""}
    if not words:
        raise UserError(f"the lexicon {path} holds no word: give one in each line")
    return words
