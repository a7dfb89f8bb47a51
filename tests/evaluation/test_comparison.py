"""Two runs on the same utterances: MAPSSWE by hand, and who gains or loses."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.evaluation.alignment import align, errors_of
from fedasr.evaluation.comparison import compare, in_words, permutation_p
from fedasr.evaluation.hypotheses import Hypothesis
from fedasr.evaluation.mapsswe import mapsswe, segments

FIXTURES = Path(__file__).parent / "fixtures"

# Reference, two hypotheses, and by hand: errors of both in each segment.
BY_HAND = [
    # Stretches of two right words separate: "c" alone is wrong in the first, "f" in the second.
    ("a b c d e f", "a b x d e f", "a b c d e y", [(1, 0), (0, 1)]),
    # One right word between does not.
    ("a b c d e", "a b x d y", "a b c d e", [(2, 0)]),
    # Nor do two that only one of them has right.
    ("a b c d", "x b c d", "a b y d", [(1, 1)]),
    # An insertion within breaks a stretch: neither half has two words.
    ("a b c", "x b i c", "x b c", [(2, 1)]),
    ("a b c d", "a b i c d", "a b c d", [(1, 0)]),
    # At the ends.
    ("a b", "i a b j", "a b", [(1, 0), (1, 0)]),
    ("a b", "", "a b", [(2, 0)]),
    ("a b c", "a b c", "a b c", []),
    ("", "i", "", [(1, 0)]),
]


def pair(said, one, other):
    return align(said.split(), one.split()), align(said.split(), other.split())


@pytest.mark.parametrize(("said", "one", "other", "expected"), BY_HAND)
def test_segments_by_hand(said, one, other, expected):
    assert segments(*pair(said, one, other)) == expected
    swapped = [(b, a) for a, b in expected]
    assert segments(*pair(said, other, one)) == swapped


def test_the_statistic_by_hand():
    """Differences 1, -1, 2, 0, 1, 1, 1, 1, 2, 1: sum 9, squares 15."""
    found = mapsswe(pair(*case[:3]) for case in BY_HAND)
    differences = [a - b for case in BY_HAND for a, b in case[3]]
    assert sorted(differences) == [-1, 0, 1, 1, 1, 1, 1, 1, 2, 2]
    variance = (15 - 81 / 10) / 9
    assert found.segments == 10
    assert found.mean == pytest.approx(0.9)
    assert found.sd == pytest.approx(math.sqrt(variance))
    assert found.z == pytest.approx(0.9 / math.sqrt(variance / 10))
    stats = pytest.importorskip("scipy.stats")
    assert found.p == pytest.approx(2 * stats.norm.sf(found.z))
    same = mapsswe([pair("a b", "a", "a")])
    assert (same.z, same.p) == (0.0, 1.0)
    assert mapsswe([]).p == 1.0
    # Two segments that differ alike are no certainty.
    for alike in (1, 2):
        told = mapsswe([pair("a b", "a", "a b")] * alike)
        assert told.mean == 1 and math.isnan(told.z) and math.isnan(told.p)


@pytest.mark.parametrize(
    ("name", "segments_", "errors", "mean", "sd", "z"),
    [
        ("sparse", 56, (71, 39), 0.571, 1.158, 3.694),
        ("dense", 58, (179, 138), 0.707, 1.737, 3.099),
    ],
)
def test_figures_are_those_of_nist(name, segments_, errors, mean, sd, z):
    """Made-up utterances; of the same texts NIST's sclite and sc_stats 1.3 (-t mapsswe -v) said so.

    Columns of the files: reference, first, second hypothesis.
    """
    lines = (FIXTURES / f"{name}.tsv").read_text().splitlines()
    pairs = [pair(*line.split("\t")) for line in lines]
    found = mapsswe(pairs)
    assert found.segments == segments_
    assert [found.mean, found.sd, found.z] == pytest.approx([mean, sd, z], abs=5e-4)
    assert tuple(sum(errors_of(each[i]) for each in pairs) for i in (0, 1)) == errors


def test_the_test_is_calibrated():
    """Of two recognisers that are alike a twentieth are told apart."""
    rng = np.random.default_rng(0)
    told, trials = 0, 400
    for _ in range(trials):
        pairs = []
        for _ in range(30):
            said = list("abcdefghij")
            heard = [[w if rng.random() > 0.15 else "x" for w in said] for _ in range(2)]
            pairs.append((align(said, heard[0]), align(said, heard[1])))
        told += mapsswe(pairs).p < 0.05
    assert 0.02 < told / trials < 0.085


def test_signs_are_flipped():
    values = np.array([1.0, 2.0, 0.5, 3.0, -0.25])
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True)))
            for signs in itertools.product((1, -1), repeat=5)]  # fmt: skip
    assert permutation_p(values) == pytest.approx(np.mean(np.array(sums) >= 6.25))
    assert permutation_p(np.zeros(4)) == 1.0
    # Sums that are 0 but for rounding are reached by all.
    assert permutation_p(np.array([0.1, 0.2, -0.3])) == 1.0
    many = np.full(40, 1.0)
    assert permutation_p(many) == pytest.approx(1 / 10_001)


def runs():
    """The second run has lost b's words, and c's are better."""
    said = {"a": "one two three", "b": "four five six", "c": "one one two"}
    first = {"a": "one two three", "b": "four five six", "c": "one too"}
    second = {"a": "one two three", "b": "four nine", "c": "one one too"}
    gender = {"a": "f", "b": "m", "c": "f"}
    return [
        [
            Hypothesis("test", user, i, said[user], heard[user], metadata={"gender": gender[user]})
            for user in said
            for i in range(2)
        ]
        for heard in (first, second)
    ]


def test_who_gains_and_who_loses():
    first, second = runs()
    found = compare(first, [*second, Hypothesis("test", "z", 0, "x", "x")])
    assert (found["gained"], found["lost"], found["equal"]) == (1, 1, 1)
    assert [row["user"] for row in found["by_user"]] == ["b", "a", "c"]
    assert found["by_user"][0]["difference"] == pytest.approx(200 / 3)
    assert found["difference"]["all"] == pytest.approx(100 * (4 - 2) / 18)
    assert found["difference"]["mean"] == pytest.approx((200 / 3 - 100 / 3) / 3)
    assert found["utterances"] == 6
    opposite = compare(second, first)
    assert opposite["difference"]["all"] == pytest.approx(-found["difference"]["all"])
    assert opposite["mapsswe"]["z"] == pytest.approx(-found["mapsswe"]["z"])
    text = in_words(found)
    assert "1 users gain, 1 lose" in text and "loses: b: 0.0 -> 66.7 (6 words)" in text


def test_differences_vary_by_users_and_not_by_utterances():
    """Of 16 users 8 lose every word, in each of 10 utterances: between 25 and 75 points or so."""

    def run(lost):
        return [
            Hypothesis(
                "test",
                f"u{user:02}",
                i,
                "one two",
                "" if user % 2 < lost else "one two",
                metadata={"side": "lr"[user // 8]},
            )
            for user in range(16)
            for i in range(10)
        ]

    found = compare(run(0), run(1))
    for name in ("all", "mean"):
        low, high = found["difference"]["intervals"][name]
        assert found["difference"][name] == 50 and low < 28 and high > 72, name
    low, high = found["groups"]["side"]["l"]["interval"]
    assert low < 20 and high > 80
    assert "differ all alike" in in_words(found)


def test_what_cannot_be_compared():
    first, _ = runs()
    with pytest.raises(UserError, match="no utterance in common"):
        compare(first, [Hypothesis("dev", "a", 0, "one", "one")])
    with pytest.raises(UserError, match="utterance 0 of user 'a' in 'test' is there twice"):
        compare(first, [*first, first[0]])
    with pytest.raises(UserError, match="other references"):
        compare(first, [Hypothesis("test", "a", 0, "one", "one")])
