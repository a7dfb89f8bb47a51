"""Word and character error rates of a whole corpus."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedasr.errors import UserError


@dataclass(frozen=True)
class ErrorRate:
    """Edits against reference tokens; rates of parts are added by `+` before dividing.

    Attributes:
      errors: substitutions + deletions + insertions of the least-cost alignments.
      total: tokens in the references.
    """

    errors: int = 0
    total: int = 0

    @property
    def percent(self) -> float:
        """100 x errors / total; without any reference token, total counts as 1 (stays finite)."""
        return 100.0 * self.errors / max(self.total, 1)

    def __add__(self, other: "ErrorRate") -> "ErrorRate":
        return ErrorRate(self.errors + other.errors, self.total + other.total)


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Word edits over a corpus: its `percent` is the word error rate.

    Words are what white space separates. An empty reference adds no token to the total, and every
    word recognised for it counts as an insertion.

    Args:
      references: true texts.
      hypotheses: recognised texts, in the same order.

    Raises:
      ValueError: different numbers of references and hypotheses.
      UserError: rapidfuzz is missing.
    """
    return _errors([r.split() for r in references], [h.split() for h in hypotheses])


def published_word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """The word error rate as the programs of arXiv 2310.00098 compute it, in percent.

    The mean of the utterances' own rates, weighted by their number of words and 2: what separates
    words is counted where a reference begins and ends with a space, as targets do there. Short
    utterances so count for more than in the rate of the corpus (`word_errors`). A reference without
    words is left out.

    Args:
      references, hypotheses: see `word_errors`.

    Raises:
      ValueError, UserError: see `word_errors`.
    """
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r.split()]
    rates = [word_errors([r], [h]) for r, h in pairs]
    weights = sum(rate.total + 2 for rate in rates)
    weighted = sum(rate.errors / rate.total * (rate.total + 2) for rate in rates)
    return 100.0 * weighted / max(weights, 1)


def char_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Character edits over a corpus: its `percent` is the character error rate.

    Spaces between words count as characters; white space at the ends is ignored and runs of it
    count as one space. Otherwise as `word_errors`.
    """
    return _errors(
        [" ".join(r.split()) for r in references], [" ".join(h.split()) for h in hypotheses]
    )


def _errors(references, hypotheses) -> ErrorRate:
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError("error rates need rapidfuzz: install it (pip install rapidfuzz)") from None
    pairs = zip(references, hypotheses, strict=True)
    return ErrorRate(sum(Levenshtein.distance(*pair) for pair in pairs), sum(map(len, references)))
