"""The likeliest token of each frame, repeats and blanks left out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedasr.decoding.language import Knowledge
from fedasr.errors import UserError
from fedasr.kernels.ctc import BLANK
from fedasr.text import Tokenizer


def make(tokenizer: Tokenizer, knowledge: Knowledge) -> Callable[[np.ndarray], str]:
    """See `fedasr.decoding.registry.Maker`.

    Raises:
      UserError: there is a language model or a lexicon, of which it has no use.
    """
    if knowledge.model is not None or knowledge.lexicon is not None:
        raise UserError(
            "greedy decoding has no use for a language model or lexicon: choose the decoder 'beam' "
            "or 'lexicon', or leave them out"
        )

    def decode(log_probs: np.ndarray) -> str:
        best = np.argmax(log_probs, axis=-1)
        first = np.append(True, best[1:] != best[:-1]) if len(best) else np.zeros(0, bool)
        return tokenizer.decode(best[first & (best != BLANK)])

    return decode
