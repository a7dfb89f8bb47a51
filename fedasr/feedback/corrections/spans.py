"""What devices can see: where a text was changed, and how alike two texts sound."""

from collections.abc import Sequence
from typing import NamedTuple

from fedasr.errors import UserError


def apply(words: Sequence[str], edits: Sequence[tuple[int, int, Sequence[str]]]) -> list[str]:
    """The words with the ranges start..stop-1, in ascending order, replaced."""
    out: list[str] = []
    done = 0
    for start, stop, new in edits:
        out += [*words[done:start], *new]
        done = stop
    return out + list(words[done:])


class Span(NamedTuple):
    """Words start..stop-1 of the hypothesis became words first..last-1 of the edited text."""

    start: int
    stop: int
    first: int
    last: int


def differences(source: Sequence[str], target: Sequence[str]) -> list[Span]:
    """Runs of words that a least-cost alignment leaves different; there are equal ones between."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError("corrections need rapidfuzz: install it (pip install rapidfuzz)") from None
    spans: list[Span] = []
    for step in Levenshtein.opcodes(list(source), list(target)):
        if step.tag == "equal":
            continue
        i1, i2, j1, j2 = step.src_start, step.src_end, step.dest_start, step.dest_end
        if spans and (spans[-1].stop, spans[-1].last) == (i1, j1):
            spans[-1] = Span(spans[-1].start, i2, spans[-1].first, j2)
        else:
            spans.append(Span(i1, i2, j1, j2))
    return spans


def changed_spans(hypothesis: str, edited: str) -> list[Span]:
    """Where an edit changed a text, in ascending order, without overlaps.

    A run of words that were only put in, or only taken out, is widened by the word before it (at
    the start by the word after it): there is nothing to compare with otherwise.
    """
    source, target = hypothesis.split(), edited.split()
    spans: list[Span] = []
    for span in differences(source, target):
        if span.start == span.stop or span.first == span.last:
            if span.start and span.first:
                span = Span(span.start - 1, span.stop, span.first - 1, span.last)
            elif span.stop < len(source) and span.last < len(target):
                span = Span(span.start, span.stop + 1, span.first, span.last + 1)
        if spans and (spans[-1].stop > span.start or spans[-1].last > span.first):
            before = spans.pop()
            span = Span(before.start, span.stop, before.first, span.last)
        spans.append(span)
    return spans


_SOUNDS = {
    letter: name
    for name, letters in {
        "a": "aeiouyhw",
        "b": "bfpv",
        "k": "cgjkqsxz",
        "t": "dt",
        "l": "lr",
        "n": "mn",
    }.items()
    for letter in letters
}


def sound(text: str) -> str:
    """A text by classes of letters that are easily taken for one another, runs written once."""
    folded = [_SOUNDS.get(letter, "") for letter in text]
    return "".join(a for a, b in zip(folded, ["", *folded], strict=False) if a != b)


def similarity(heard: str, written: str) -> float:
    """How alike two texts are in letters and in sound: from 0 to 1, the mean of both.

    Each is one minus the edit distance over the longer length; spaces do not count.
    """
    from rapidfuzz.distance import Levenshtein

    a, b = heard.replace(" ", ""), written.replace(" ", "")
    by_letter = Levenshtein.normalized_similarity(a, b)
    return (by_letter + Levenshtein.normalized_similarity(sound(a), sound(b))) / 2
