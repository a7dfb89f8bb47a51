"""Sentences as attempted handwriting is labelled: 31 characters, with punctuation."""

from __future__ import annotations

from fedasr.text.alphabets import HANDWRITING
from fedasr.text.normalize import DIGIT, LETTER, SYMBOL, Loss, Normalised

# The authors' signs for a space and a full stop, which were written by hand as such; and what
# typesetting makes of an apostrophe.
_SAME = str.maketrans({">": " ", "~": ".", "\u2018": "'", "\u2019": "'", "\u2032": "'"})


def handwriting_text(text: str) -> Normalised:
    """A sentence in `HANDWRITING`: lower case, punctuation kept, spaces single.

    After the public code of Willett et al. (Nature 593, 2021) and CORP, whose ">" is a space and
    whose "~" is a full stop; their order of the characters is that of `HANDWRITING`.

    Args:
      text: as it was shown, or in the authors' signs.

    Returns:
      The text, and a loss for each character that cannot be written.
    """
    lowered = text.translate(_SAME).lower()
    lost = [c for c in lowered if c not in HANDWRITING and not c.isspace()]
    losses = [Loss(c, DIGIT if c.isdigit() else LETTER if c.isalpha() else SYMBOL) for c in lost]
    return Normalised(" ".join(lowered.split()), tuple(losses))
