"""Prefix beam search over the words of a lexicon, and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from fedasr.decoding.beam import BeamDecoder
from fedasr.decoding.language import Knowledge, characters_of, spellings
from fedasr.errors import UserError
from fedasr.text import Tokenizer

_NEVER = 1e6  # nats: more than any utterance's scores


def make(tokenizer: Tokenizer, knowledge: Knowledge) -> Callable[[np.ndarray], str]:
    """See `fedasr.decoding.registry.Maker`.

    A part of a word at the end, where every hypothesis in the beam has one, is left out.

    Raises:
      UserError: there is no lexicon and no language model to have the words of, none of the words
        can be written, or the tokens are not characters with a space among them.
    """
    tokens, known = characters_of(tokenizer), knowledge.known_words()
    if known is None:
        raise UserError(
            "the decoder 'lexicon' needs words: give a lexicon or a language model, such as "
            "lexicon=from_train"
        )
    lexicon = spellings(known, tokenizer)
    if not lexicon:
        raise UserError(
            f"none of the {len(known)} words of the lexicon can be written with the alphabet "
            f"{''.join(tokens)!r}: write them as the prepared transcripts are written"
        )
    beam = dataclasses.replace(knowledge.beam, unknown_penalty=_NEVER)
    search = BeamDecoder(tokens, " ", knowledge.model, lexicon, beam)

    def decode(log_probs: np.ndarray) -> str:
        return " ".join(word for word in search(log_probs).words if word in lexicon)

    return decode
