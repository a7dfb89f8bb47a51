"""Least-cost alignments of what was recognised with what was said."""

from collections.abc import Sequence
from typing import NamedTuple

from fedasr.errors import UserError

EQUAL, SUBSTITUTED, DELETED, INSERTED = "=", "S", "D", "I"
NOTHING = ""  # the reference's side of an insertion, the hypothesis's of a deletion


class Pair(NamedTuple):
    """One step of an alignment: a kind of the four above, and the tokens, "" for none."""

    kind: str
    reference: str
    hypothesis: str


def words_of(text: str) -> list[str]:
    """What white space separates."""
    return text.split()


def characters_of(text: str) -> list[str]:
    """Characters; white space at the ends does not count, and runs of it are one space."""
    return list(" ".join(text.split()))


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Pair]:
    """An alignment of least cost, every edit costing 1, in order.

    Of several of the same cost it is the one that rapidfuzz finds; jiwer shows the same.

    Args:
      reference: true tokens.
      hypothesis: recognised tokens.

    Raises:
      UserError: rapidfuzz is missing.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError("alignments need rapidfuzz: install it (pip install rapidfuzz)") from None
    pairs: list[Pair] = []
    for step in Levenshtein.opcodes(reference, hypothesis):
        said = reference[step.src_start : step.src_end]
        heard = hypothesis[step.dest_start : step.dest_end]
        if step.tag == "insert":
            pairs += (Pair(INSERTED, NOTHING, token) for token in heard)
        elif step.tag == "delete":
            pairs += (Pair(DELETED, token, NOTHING) for token in said)
        else:
            kind = EQUAL if step.tag == "equal" else SUBSTITUTED
            pairs += (Pair(kind, *both) for both in zip(said, heard, strict=True))
    return pairs


def errors_of(pairs: Sequence[Pair]) -> int:
    """Substitutions, deletions and insertions."""
    return sum(pair.kind != EQUAL for pair in pairs)
