"""What is taken for what."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fedasr.evaluation.alignment import EQUAL, Pair
from fedasr.evaluation.hypotheses import Hypothesis

MOST = 50  # confusions that are told


def confusions(alignments: Iterable[Iterable[Pair]], most: int = MOST) -> list[dict[str, Any]]:
    """The most frequent edits: {"reference", "hypothesis", "count", "of"}.

    "" as reference is an insertion, as hypothesis a deletion; "of" is how often the reference's
    token was said (of an insertion, None). Equally frequent ones are in the order of their tokens.
    """
    edits: Counter = Counter()
    said: Counter = Counter()
    for pairs in alignments:
        for kind, reference, hypothesis in pairs:
            said[reference] += bool(reference)
            if kind != EQUAL:
                edits[reference, hypothesis] += 1
    order = sorted(edits.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"reference": r, "hypothesis": h, "count": count, "of": said[r] if r else None}
        for (r, h), count in order[:most]
    ]


def both(found: Iterable[Hypothesis], most: int = MOST) -> dict[str, list[dict[str, Any]]]:
    """`confusions` of "words" and "characters"."""
    found = list(found)
    return {
        "words": confusions((one.words() for one in found), most),
        "characters": confusions((one.characters() for one in found), most),
    }
