import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.training.metrics import ErrorRate, char_errors, word_errors

TEXTS = st.text("ab c", max_size=12)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), max_size=5)


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@given(PAIRS)
@settings(deadline=None, max_examples=100)
def test_totals_equal_the_textbook_edit_distance(pairs):
    references, hypotheses = [p[0] for p in pairs], [p[1] for p in pairs]
    for count, tokens in ((word_errors, str.split), (char_errors, lambda s: " ".join(s.split()))):
        result = count(references, hypotheses)
        assert result.errors == sum(edit_distance(tokens(r), tokens(h)) for r, h in pairs)
        assert result.total == sum(len(tokens(r)) for r in references)


@given(PAIRS, PAIRS)
@settings(deadline=None, max_examples=30)
def test_adding_parts_equals_the_whole(a, b):
    def unzip(pairs):
        return [p[0] for p in pairs], [p[1] for p in pairs]

    assert word_errors(*unzip(a)) + word_errors(*unzip(b)) == word_errors(*unzip(a + b))


def test_corpus_rate_weighs_by_reference_length():
    result = word_errors(["turn on the light", "stop"], ["turn the lights", "stop"])
    assert result == ErrorRate(errors=2, total=5)
    assert result.percent == pytest.approx(40.0)
    assert char_errors(["abcd"], ["abxd"]).percent == pytest.approx(25.0)


def test_insertions_for_an_empty_reference_count():
    assert word_errors(["", "a b"], ["x y", "a b"]) == ErrorRate(2, 2)
    assert word_errors([""], ["x y"]).percent == 200.0
    assert ErrorRate().percent == 0.0


def test_white_space_is_not_an_error():
    assert word_errors([" a  b "], ["a b"]).errors == 0
    assert char_errors([" a  b "], ["a b"]) == ErrorRate(0, 3)


def test_different_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match="2 references but 1"):
        word_errors(["a", "b"], ["a"])


def test_missing_rapidfuzz_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(UserError, match="rapidfuzz"):
        word_errors(["a"], ["a"])
