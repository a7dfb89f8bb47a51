"""Sentences in phonemes: by a dictionary, or as the published speech decoders' labels were made."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedasr.errors import UserError
from fedasr.text.lexicon import pronounced
from fedasr.text.tokenizers import SILENCE

Lexicon = Mapping[str, Iterable[tuple[str, ...]]]


@functools.cache
def _g2p() -> Callable[[str], list[str]]:
    try:
        from g2p_en import G2p
    except ImportError:
        raise UserError(
            "words without a dictionary are pronounced by g2p_en: pip install 'fedasr[g2p]', or "
            "give a --lexicon that has them all"
        ) from None
    try:
        return G2p()
    except LookupError as error:  # of NLTK, whose data it downloads when it first runs
        first = str(error).strip().splitlines()[0]
        raise UserError(f"g2p_en lacks data of NLTK that it downloads: {first}") from error


def graphemes_to_phonemes(text: str) -> list[str]:
    """The phonemes of a text by g2p_en, without stress; `SILENCE` for each space.

    Args:
      text: words with spaces between.

    Raises:
      UserError: g2p_en is missing, or its data.
    """
    found = []
    for piece in _g2p()(text):
        if piece == " ":
            found.append(SILENCE)
        elif re.match("[A-Z]", phoneme := re.sub("[0-9]", "", piece)):
            found.append(phoneme)
    return found


def sentence_phonemes(
    text: str, lexicon: Lexicon | None, guess: bool, final_silence: bool
) -> tuple[str, list[str]]:
    """A sentence in phonemes, silence between words.

    The published labels are `sentence_phonemes(text, None, True, True)`: g2p_en reads the whole
    sentence, which tells heteronyms apart by their neighbours. With a dictionary it is asked for
    the words that the dictionary lacks, each by itself.

    Args:
      text: words with spaces between, as `normalize_text` returns them.
      lexicon: of `read_lexicon`, of which each word's first pronunciation is taken; None for none.
      guess: whether g2p_en pronounces what the dictionary lacks.
      final_silence: whether silence comes after the last word, too.

    Returns:
      The phonemes as `PhonemeTokenizer.encode` takes them, and the words that have none.

    Raises:
      UserError: see `graphemes_to_phonemes`.
    """
    if lexicon is None:
        phonemes = graphemes_to_phonemes(text)
    else:
        known: Any = lexicon
        if guess and (unknown := [word for word in text.split() if word not in lexicon]):
            known = {**lexicon, **{word: [tuple(graphemes_to_phonemes(word))] for word in unknown}}
        spelled, missing = pronounced(text, known)
        if missing:
            return "", missing
        phonemes = spelled.split()
    return " ".join([*phonemes, *([SILENCE] if final_silence else [])]), []
