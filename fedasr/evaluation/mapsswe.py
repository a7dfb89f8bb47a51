"""The matched-pairs test on segments of sentences, by which NIST compares two recognisers."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fedasr.evaluation.alignment import EQUAL, INSERTED, Pair

MIN_CORRECT = 2


class Mapsswe(NamedTuple):
    """The test's result.

    segments: with an error of either. mean: errors of the first less those of the second, a
    segment. sd: of that difference. z: the statistic. p: two-sided. These are 0 and 1 where no
    segment differs, NaN where all differ alike: two segments must not pass for a certainty.
    """

    segments: int
    mean: float
    sd: float
    z: float
    p: float


def _columns(pairs: Sequence[Pair]) -> tuple[list[bool], list[int]]:
    """Whether each reference word is correct [n]; insertions before each, and at the end [n+1]."""
    correct: list[bool] = []
    inserted = [0]
    for pair in pairs:
        if pair.kind == INSERTED:
            inserted[-1] += 1
        else:
            correct.append(pair.kind == EQUAL)
            inserted.append(0)
    return correct, inserted


def segments(
    first: Sequence[Pair], second: Sequence[Pair], min_correct: int = MIN_CORRECT
) -> list[tuple[int, int]]:
    """Errors of both in each segment of an utterance: [(of the first, of the second)].

    Segments are what lies between stretches of at least `min_correct` reference words that both
    have right, with no insertion of either within, and between those and the utterance's ends.
    Segments without an error of either are left out.

    Args:
      first, second: alignments of two hypotheses with one reference.
      min_correct: words of a stretch that separates.

    Raises:
      ValueError: the references differ.
    """
    words = [[p.reference for p in pairs if p.kind != INSERTED] for pairs in (first, second)]
    if words[0] != words[1]:
        raise ValueError("the alignments are of different references")
    sides = [_columns(pairs) for pairs in (first, second)]
    found, errors, run = [], [0, 0], 0
    for place in range(len(words[0]) + 1):
        inserted = [side[1][place] for side in sides]
        errors = _sums(errors, inserted)
        run = 0 if any(inserted) else run
        if place == len(words[0]):
            break
        wrong = [not side[0][place] for side in sides]
        errors = _sums(errors, wrong)
        run = 0 if any(wrong) else run + 1
        if run == min_correct:
            found.append((errors[0], errors[1]))
            errors = [0, 0]
    found.append((errors[0], errors[1]))
    return [pair for pair in found if any(pair)]


def _sums(errors: Sequence[int], more: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(errors, more, strict=True)]


def mapsswe(
    alignments: Iterable[tuple[Sequence[Pair], Sequence[Pair]]], min_correct: int = MIN_CORRECT
) -> Mapsswe:
    """Whether two recognisers differ (matched pairs, sentence segments, word errors).

    With z_i the first's errors less the second's in segment i of n, mu their mean and s^2 their
    variance over n - 1, the statistic is mu / (s / sqrt(n)), which is standard normal if the two
    are alike: segments, unlike words, may be taken for independent, because at least `min_correct`
    words that both have right lie between them (L. Gillick and S. Cox, Some statistical issues in
    the comparison of speech recognition algorithms, ICASSP 1989; test "mapsswe" of NIST's
    sc_stats, which takes 2 words, too, and leaves out segments without errors).

    Args:
      alignments: for each utterance those of the two, with the same reference.
      min_correct: see `segments`.
    """
    differences = np.array(
        [a - b for pair in alignments for a, b in segments(*pair, min_correct)], np.float64
    )
    count = len(differences)
    mean = float(differences.mean()) if count else 0.0
    sd = float(differences.std(ddof=1)) if count > 1 else 0.0
    if not sd:  # all alike: no variance to judge by, unless there is no difference at all
        z = math.nan if mean else 0.0
    else:
        z = mean / (sd / math.sqrt(count))
    return Mapsswe(count, mean, sd, z, math.erfc(abs(z) / math.sqrt(2)))
