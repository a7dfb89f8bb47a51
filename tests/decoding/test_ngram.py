import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.decoding.ngram import BEGIN, END, UNKNOWN, NGram, estimate, read_arpa, write_arpa
from fedasr.errors import UserError

TEXTS = ["a b c", "a b", "b c a", "c", "a b d a", "a c b"]


def outcomes(model):
    return [*model.vocabulary, UNKNOWN, END]


def contexts(model, words):
    """Every context of up to order - 1 words, seen or not, as `score` makes them."""
    for count in range(model.order + 1):
        for chosen in itertools.product(words, repeat=count):
            context = model.start
            for word in chosen:
                _, context = model.score(context, word)
            yield context


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=5).map(" ".join), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([None, "ab"]),
)
def test_probabilities_sum_to_one_after_any_context(texts, order, vocabulary):
    model = estimate(texts, order, vocabulary)
    for context in contexts(model, "axd"):
        total = sum(math.exp(model.score(context, word)[0]) for word in outcomes(model))
        assert total == pytest.approx(1, abs=1e-9)


def kneser_ney_bigram(texts, previous, word):
    """Interpolated modified Kneser-Ney of order 2 from its definition, with fixed discounts."""
    discount = {0: 0.0, 1: 0.5, 2: 1.0}
    sentences = [[BEGIN, *text.split(), END] for text in texts]
    bigrams = Counter(pair for s in sentences for pair in itertools.pairwise(s))
    words = {w for s in sentences for w in s} - {BEGIN} | {UNKNOWN}
    types = Counter(second for _, second in bigrams)
    d = lambda c: discount.get(c, 1.5)  # noqa: E731
    left = sum(d(c) for c in types.values()) / len(bigrams)
    lower = (types[word] - d(types[word])) / len(bigrams) + left / len(words)
    after = {pair: c for pair, c in bigrams.items() if pair[0] == previous}
    total = sum(after.values())
    count = bigrams[previous, word]
    share = sum(map(d, after.values())) / total
    return (count - d(count)) / total + share * lower


def test_bigrams_agree_with_the_definition():
    # So few n-grams that the discounts are the fixed ones.
    texts = ["a b", "a b", "a c a b"]
    model = estimate(texts, 2)
    for previous, word in itertools.product("abc", ["a", "b", "c", UNKNOWN, END]):
        value, _ = model.score((previous,), word)
        assert math.exp(value) == pytest.approx(kneser_ney_bigram(texts, previous, word)), (
            previous,
            word,
        )


def test_discounts_are_estimated_where_there_is_enough():
    # 4 n-grams once, 2 twice, 1 three times, 1 four times: Y = 4 / (4 + 2 x 2) = 1/2.
    texts = ["a", "b", "c", "d", "e e", "f f", "g g g", "h h h h", *[""] * 9]
    model = estimate(texts, 1)
    d1, d2, d3 = 1 - 2 * 0.5 * 2 / 4, 2 - 3 * 0.5 * 1 / 2, 3 - 4 * 0.5 * 1 / 1
    total = 4 + 4 + 3 + 4 + len(texts)
    left = (4 * d1 + 2 * d2 + 3 * d3) / total / 10  # 8 letters, the end, <unk>
    for word, count, d in (("a", 1, d1), ("e", 2, d2), ("g", 3, d3), ("h", 4, d3)):
        assert math.exp(model.score((), word)[0]) == pytest.approx((count - d) / total + left)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_arpa_files_hold_the_same_model(tmp_path, order):
    model = estimate(TEXTS, order, "abc")
    write_arpa(model, tmp_path / "a.arpa")
    again = read_arpa(tmp_path / "a.arpa")
    assert (again.order, again.vocabulary) == (order, {"a", "b", "c"})
    assert set(again.grams) == set(model.grams)
    for text in [*TEXTS, "zebra a", ""]:
        assert again.sentence(text) == pytest.approx(model.sentence(text), abs=1e-6)
    lines = (tmp_path / "a.arpa").read_text().splitlines()
    assert lines[:2] == ["\\data\\", f"ngram 1={6 if order > 1 else 5}"]  # <s>, </s>, <unk>


def test_arpa_by_hand(tmp_path):
    content = """\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.6\t</s>
-0.4\ta\t-0.25

\\2-grams:
-0.1\t<s> a

\\end\\
"""
    (tmp_path / "a.arpa").write_text(content)
    model = read_arpa(tmp_path / "a.arpa")
    # <s> a: the bigram; a </s>: back-off of a; an unknown word: <unk> with the back-off before it.
    assert model.sentence("a") / math.log(10) == pytest.approx(-0.1 - 0.25 - 0.6)
    assert model.sentence("x") / math.log(10) == pytest.approx(-0.5 - 1.0 - 0.6)
    (tmp_path / "b.arpa").write_text(content.replace("ngram 2=1", "ngram 2=2"))
    (tmp_path / "c.arpa").write_text(content.replace("-0.1\t<s> a", "minus\t<s> a"))
    (tmp_path / "e.arpa").write_text("\\data\\\n\n\\end\\\n")
    mistakes = {"b": "no whole", "c": "line 12", "d": "cannot be read", "e": "no whole"}
    for name, message in mistakes.items():
        with pytest.raises(UserError, match=message):
            read_arpa(tmp_path / f"{name}.arpa")


def test_unknown_words_share_one_probability():
    model = estimate(TEXTS, 3, "abc")
    assert "d" not in model.vocabulary
    assert model.score(("a",), "d") == model.score(("a",), "zebra") == model.score(("a",), UNKNOWN)
    assert model.score(("a",), "d")[0] > math.log(1e-3)  # it was seen in training
    assert math.isfinite(estimate(TEXTS, 3).sentence("zebra zebra"))


def test_a_closed_model_calls_unknown_words_nearly_impossible():
    model = NGram(1, {("a",): (-0.3, 0.0), (END,): (-0.3, 0.0)})
    assert model.score((), "b")[0] < -200


def test_a_model_knows_its_text_better_than_a_unigram_does():
    assert estimate(TEXTS, 3).perplexity(TEXTS) < 0.7 * estimate(TEXTS, 1).perplexity(TEXTS)


@pytest.mark.parametrize(("texts", "order"), [([], 2), (["a"], 0), (["a <s> b"], 2)])
def test_texts_that_make_no_model(texts, order):
    with pytest.raises(UserError):
        estimate(texts, order)
