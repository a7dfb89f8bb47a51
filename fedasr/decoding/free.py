"""Prefix beam search over any spelling, with a language model of words if there is one."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import numpy as np

from fedasr.decoding.beam import BeamDecoder
from fedasr.decoding.language import Knowledge, characters_of, spellings
from fedasr.text import Tokenizer


def make(tokenizer: Tokenizer, knowledge: Knowledge) -> Callable[[np.ndarray], str]:
    """See `fedasr.decoding.registry.Maker`.

    Words that neither the lexicon nor the model has are written as they are spelled, at the price
    of `BeamConfig.unknown_penalty`.

    Raises:
      UserError: the tokens are not characters with a space among them.
    """
    tokens, lexicon = characters_of(tokenizer), None
    known = knowledge.known_words()
    if known is not None:
        lexicon = spellings(known, tokenizer)
    search = BeamDecoder(tokens, " ", knowledge.model, lexicon, knowledge.beam)

    def decode(log_probs: np.ndarray) -> str:
        return unicodedata.normalize("NFC", search(log_probs).text)

    return decode
