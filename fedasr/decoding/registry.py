"""Decoders by name: from the scores of an utterance to its text.

A decoder is a function of log probabilities. To add one, write a module with a function as `Maker`
describes it, and a line in `DECODERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from fedasr.decoding import free, greedy, words
from fedasr.decoding.language import Knowledge
from fedasr.errors import UserError
from fedasr.text import Tokenizer

GREEDY = "greedy"


class Decoder(Protocol):
    """Decodes one utterance."""

    def __call__(self, log_probs: np.ndarray, /) -> str:
        """The text, words with a space between.

        Args:
          log_probs: float [frames, vocab], of the tokens in each true frame; 0 is the blank.
        """
        ...


# From the tokenizer that wrote the labels, and what is known of the language.
Maker = Callable[[Tokenizer, Knowledge], Decoder]
DECODERS: dict[str, Maker] = {
    GREEDY: greedy.make,
    "beam": free.make,
    "lexicon": words.make,
}


def make_decoder(name: str, tokenizer: Tokenizer, knowledge: Knowledge | None = None) -> Decoder:
    """A decoder by name.

    Args:
      name: of `DECODERS`: "greedy" takes the likeliest token of each frame, "beam" searches for the
        likeliest text, with a language model if there is one, "lexicon" for the likeliest words of
        a list.
      tokenizer: that wrote the labels.
      knowledge: language model, lexicon and their weights; None for none.

    Raises:
      UserError: an unknown name, tokens that the decoder cannot search, or a decoder that needs
        what `knowledge` lacks, or has no use for it.
    """
    if name not in DECODERS:
        raise UserError(f"unknown decoder {name!r}: choose one of {', '.join(DECODERS)}")
    return DECODERS[name](tokenizer, knowledge or Knowledge())
