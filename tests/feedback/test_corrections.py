import collections
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import ClientBatcher, LocalBatches, make_buckets
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.feedback import corrections as lib
from fedasr.feedback.corrections.spans import apply, differences
from fedasr.feedback.histograms import client_histogram
from fedasr.kernels.ctc import is_feasible
from fedasr.models.recogniser import Recogniser
from fedasr.text import CharTokenizer
from fedasr.training.evaluation import Evaluator

texts = st.lists(st.sampled_from(["ab", "ba", "cd", "abcd", "e"]), max_size=7).map(" ".join)
LOOSE = lib.Filters(max_changed=1.0, min_similarity=0.0, min_frames=0)


def one(hypothesis, edited, user=0, index=0, planted=()):
    return lib.Feedback(user, index, hypothesis, edited, tuple(planted))


# ----------------------------------------------------------------------------------- spans


@given(texts, texts)
@settings(deadline=None)
def test_spans_are_all_that_differs(hypothesis, edited):
    source, target = hypothesis.split(), edited.split()
    spans = lib.changed_spans(hypothesis, edited)
    i = j = 0
    for span in spans:
        assert source[i : span.start] == target[j : span.first]  # between spans nothing changed
        assert span.start >= i and span.first >= j
        assert source[span.start : span.stop] != target[span.first : span.last]
        if source and target:
            assert span.start < span.stop and span.first < span.last
        i, j = span.stop, span.last
    assert source[i:] == target[j:]


def test_spans_by_hand():
    assert lib.changed_spans("buy two andles now", "buy two sandals now") == [(2, 3, 2, 3)]
    assert lib.changed_spans("buy s addles", "buy saddles") == [(1, 3, 1, 2)]
    assert lib.changed_spans("a b c", "a x b y c") == [(0, 1, 0, 2), (1, 2, 2, 4)]
    assert lib.changed_spans("b", "x b y") == [(0, 1, 0, 3)]  # widened, they meet
    assert lib.changed_spans("b c", "x b c") == [(0, 1, 0, 2)]
    assert lib.changed_spans("a b", "a b") == []


@given(texts, texts)
@settings(deadline=None)
def test_a_refined_label_has_the_kept_spans_replaced(hypothesis, edited):
    """Every subset that the filters may keep, against replacing from the right."""
    spans = lib.changed_spans(hypothesis, edited)
    written = edited.split()
    for kept in itertools.product([False, True], repeat=len(spans)):
        chosen = [span for span, keep in zip(spans, kept, strict=True) if keep]
        expected = hypothesis.split()
        for s in reversed(chosen):
            expected[s.start : s.stop] = written[s.first : s.last]
        edits = [(s.start, s.stop, written[s.first : s.last]) for s in chosen]
        assert apply(hypothesis.split(), edits) == expected
    reviewed = lib.review(one(hypothesis, edited), 10_000, LOOSE)
    if spans and edited:
        assert reviewed.label == edited and set(reviewed.reasons) <= {""}
    else:
        assert reviewed.label is None


# ------------------------------------------------------------------------------- similarity


@given(texts, texts)
@settings(deadline=None)
def test_similarity_is_symmetric_within_bounds(a, b):
    assert 0 <= lib.similarity(a, b) <= 1
    assert lib.similarity(a, b) == pytest.approx(lib.similarity(b, a))
    assert lib.similarity(a, a) == 1


def test_what_sounds_alike_is_alike():
    assert lib.sound("mirrors") == "nalalk" and lib.sound("'-") == ""
    assert lib.similarity("s addles", "saddles") == 1
    for heard, said in (("kumpers es", "compasses"), ("ckasheons", "cushions")):
        assert lib.similarity(heard, said) > 0.5
        assert lib.similarity(heard, said) > lib.similarity(heard, "lanterns") + 0.2


# ---------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("hypothesis", "edited", "frames", "reason"),
    [
        ("buy two andles now", "buy two sandals now", 150, ""),
        ("buy two andles now", "buy two sandals näw", 150, "charset"),
        ("buy two andles now", "buy 2 sandals now", 150, "charset"),
        ("buy two andles now", "buy two sandals now", 49, "too short"),
        ("buy two andles now", "wash seven carrots please", 150, "rewritten"),
        ("buy two andles now", "", 150, "rewritten"),
        ("buy two andles now", "buy two jackets now", 150, "no span left"),
        ("buy two andles now", "buy two sandals now", 60, "infeasible"),
        ("buy two andles now", "buy two andles now", 150, "no span left"),
    ],
)
def test_reasons(hypothesis, edited, frames, reason):
    reviewed = lib.review(one(hypothesis, edited), frames, lib.Filters())
    assert reviewed.reason == reason
    assert (reviewed.label is None) == bool(reason)


@given(st.text("ab ", min_size=1, max_size=12), st.integers(1, 60), st.integers(1, 4))
@settings(deadline=None)
def test_feasible_is_what_the_loss_can_align(text, frames, stride):
    edited = " ".join(text.split())
    filters = lib.Filters(max_changed=1.0, min_similarity=0.0, min_frames=0, stride=stride)
    reviewed = lib.review(one("q", edited), frames, filters)
    labels = np.zeros((1, 16), np.int32)
    count = len(edited) + 2
    labels[0, :count] = CharTokenizer().encode(edited, pad_space=True)
    aligned = is_feasible(labels, np.array([count]), np.array([-(-frames // stride)]))
    assert (reviewed.label is not None) == (bool(edited) and bool(aligned[0]))


def test_each_span_is_judged_for_itself():
    heard, written = "by two andles now", "buy two carrots now"
    reviewed = lib.review(one(heard, written), 200, lib.Filters(max_changed=0.6))
    assert reviewed.label == "buy two andles now"  # what was rejected is undone
    assert reviewed.reasons == ("", "similarity")


def test_trust_takes_several_clients():
    heard = ["two andles", "two sandels", "two andals", "two adles"]
    feedback = [one(h, "two sandals", user=i) for i, h in enumerate(heard)]
    feedback.append(one("two andles", "two sandalls", user=4))
    feedback.append(one("two zandels", "two sandals", user=1, index=1))  # the same client again
    keys = lib.pairs_of_users(feedback, [200] * 6, 6, lib.Filters())
    # The first sounds: andles, andals and adles begin alike, and so do sandels and zandels.
    assert keys == [
        {"a>sandals"},
        {"k>sandals"},
        {"a>sandals"},
        {"a>sandals"},
        {"a>sandalls"},
        set(),
    ]
    histogram = client_histogram(keys, most=5)
    for trusted, kept in ((0, 6), (1, 6), (2, 3), (3, 3), (4, 0)):
        filters = lib.Filters(trusted=trusted)
        labels = [lib.review(f, 200, filters, histogram).label for f in feedback]
        assert sum(label is not None for label in labels) == kept
    assert lib.trust_keys("two s addles", "two saddles") == ["t>two", "t>saddles"]


def test_a_device_reports_nothing_that_it_rejects_itself():
    feedback = [one("two andles", "two carrots"), one("two andles", "wash seven jackets please")]
    feedback.append(one("two andles", "two sandals"))
    frames = [200, 200, 49]  # the last recording is too short
    assert lib.pairs_of_users(feedback, frames, 1, lib.Filters()) == [set()]
    assert lib.pairs_of_users(feedback[2:], [50], 1, lib.Filters()) == [{"a>sandals"}]


def test_filters_do_not_know_the_truth():
    planted = [lib.Edit(1, 2, ("sandals",), kind) for kind in lib.KINDS]
    found = [
        lib.review(one("two andles", "two sandals", planted=[p]), 200, lib.Filters())
        for p in planted
    ]
    assert len(set(found)) == 1 and found[0].label == "two sandals"


@pytest.mark.parametrize(
    "bad", [{"max_changed": 2}, {"min_similarity": -1}, {"stride": 0}, {"trusted": -1}]
)
def test_filter_mistakes(bad):
    with pytest.raises(UserError):
        lib.Filters(**bad)


# ------------------------------------------------------------------------------------ edits

SAID = [
    [f"buy {n} {w} today" for n, w in itertools.product(("two", "three", "ten"), group)]
    for group in (("sandals", "lemons"), ("carrots", "kettles"), ("pistons", "gloves")) * 8
]
HEARD = [
    [text.replace("sandals", "andles").replace("pistons", "pea stirs").replace("ten", "den")
     for text in own]
    for own in SAID
]  # fmt: skip


def test_edits_are_a_function_of_the_user_and_the_seed():
    first = lib.simulate_edits(SAID, HEARD, lib.EditConfig(), seed=1)
    assert first == lib.simulate_edits(SAID, HEARD, lib.EditConfig(), seed=1)
    assert first != lib.simulate_edits(SAID, HEARD, lib.EditConfig(), seed=2)
    # What was heard of other users changes nothing.
    silent = [[""] * len(own) for own in HEARD[:5]] + HEARD[5:]
    later = [f for f in lib.simulate_edits(SAID, silent, lib.EditConfig(), seed=1) if f.user >= 5]
    assert later == [f for f in first if f.user >= 5]
    for f in first:
        assert f.hypothesis == HEARD[f.user][f.index] != f.edited
        edits = [(e.start, e.stop, e.words) for e in f.planted]
        assert apply(f.hypothesis.split(), edits) == f.edited.split()


def test_diligent_users_write_what_was_said():
    config = lib.EditConfig(active=1, corrected=1, typos=0, wrong_words=0, rewritten=0)
    found = lib.simulate_edits(SAID, HEARD, config, seed=0)
    wrong = sum(a != b for own in zip(SAID, HEARD, strict=True) for a, b in zip(*own, strict=True))
    assert len(found) == wrong > 50
    assert all(f.edited == SAID[f.user][f.index] for f in found)
    assert {e.kind for f in found for e in f.planted} == {"right"}


def test_mistakes_come_as_often_as_asked():
    config = lib.EditConfig(active=1, corrected=0.7, typos=0.3, wrong_words=0.2, rewritten=0)
    found = lib.simulate_edits(SAID, HEARD, config, seed=3)
    kinds = collections.Counter(e.kind for f in found for e in f.planted)
    spans = sum(
        len(differences(h.split(), s.split()))
        for own in zip(HEARD, SAID, strict=True)
        for h, s in zip(*own, strict=True)
    )
    total = kinds.total()
    assert abs(total / spans - 0.7) < 4 * (0.21 / spans) ** 0.5
    for kind, share in (("typo", 0.3), ("wrong word", 0.2)):
        assert abs(kinds[kind] / total - share) < 4 * (share * (1 - share) / total) ** 0.5
    vocabulary = {word for own in SAID for text in own for word in text.split()}
    for f in found:
        for e in f.planted:
            unknown = [word for word in e.words if word not in vocabulary]
            assert len(unknown) == (e.kind == "typo")


def test_rewritten_texts_are_not_what_was_said():
    config = lib.EditConfig(active=1, rewritten=1)
    found = lib.simulate_edits(SAID, HEARD, config, seed=0)
    sentences = {text for own in SAID for text in own}
    assert len(found) == sum(map(len, SAID))
    for f in found:
        assert f.edited in sentences - {SAID[f.user][f.index]}
        assert [e.kind for e in f.planted] == ["rewrite"]
    assert not lib.simulate_edits(SAID, HEARD, lib.EditConfig(active=0), seed=0)


def test_edit_mistakes():
    for bad in ({"active": 1.1}, {"typos": 0.6, "wrong_words": 0.6}):
        with pytest.raises(UserError):
            lib.EditConfig(**bad)
    with pytest.raises(UserError, match="one hypothesis"):
        lib.simulate_edits([["a"]], [["a", "b"]], lib.EditConfig(), 0)


def test_filter_quality_by_hand():
    feedback = [
        one("by two andles", "buy two sandal", planted=[
            lib.Edit(0, 1, ("buy",), "right"), lib.Edit(2, 3, ("sandal",), "typo")]),
        one("two andles", "two sandals today", planted=[
            lib.Edit(1, 2, ("sandals", "today"), "right")]),
        one("two andles", "wash a car", planted=[lib.Edit(0, 2, ("wash", "a", "car"), "rewrite")]),
        one("to gloves", "two kettles", planted=[
            lib.Edit(0, 2, ("two", "kettles"), "wrong word")]),
    ]  # fmt: skip
    reviews = [
        lib.Review(
            "buy two andles", "", (lib.Span(0, 1, 0, 1), lib.Span(2, 3, 2, 3)), ("", "untrusted")
        ),
        lib.Review("two sandals today", "", (lib.Span(1, 2, 1, 3),), ("",)),
        lib.Review(None, "rewritten", (lib.Span(0, 2, 0, 3),), ("rewritten",)),
        lib.Review("two kettles", "", (lib.Span(0, 2, 0, 2),), ("",)),
    ]
    assert lib.filter_quality(feedback, reviews) == {
        "right": {"edits": 2, "kept": 2},
        "typo": {"edits": 1, "kept": 0},
        "wrong word": {"edits": 1, "kept": 1},
        "rewrite": {"edits": 1, "kept": 0},
    }


def test_most_mistakes_are_found_and_most_corrections_kept():
    config = lib.EditConfig(active=1, corrected=1, typos=0.1, wrong_words=0.1, rewritten=0.1)
    feedback = lib.simulate_edits(SAID, HEARD, config, seed=0)
    filters = lib.Filters(trusted=2)
    pairs = client_histogram(
        lib.pairs_of_users(feedback, [200] * len(feedback), len(SAID), filters), most=20
    )
    reviews = [lib.review(f, 200, filters, pairs) for f in feedback]
    found = lib.filter_quality(feedback, reviews)
    right = found.pop("right")
    assert right["kept"] >= 0.9 * right["edits"] > 30
    wrong = sum(kind["edits"] for kind in found.values())
    assert wrong > 20 and sum(kind["kept"] for kind in found.values()) <= 0.2 * wrong


# ---------------------------------------------------------------------------------- corpora


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    encode = CharTokenizer().encode
    users = {
        f"u{i}": [
            {
                "features": rng.normal(size=(rng.integers(8, 20), 2)).astype(np.float16),
                "labels": encode(f"{'abcde'[i]} {'xyz'[j]}", pad_space=True),
            }
            for j in range(1 + i % 3)
        ]
        for i in range(5)
    }
    return InMemoryCorpus(users, ["features", "labels"])


def test_only_users_with_corrections_take_part(corpus):
    feedback = [one("", "", *at) for at in ((4, 1), (1, 0), (2, 2), (2, 0))]
    derived = lib.corrected_corpus(
        corpus, feedback, ["new words", None, "three", "one"], CharTokenizer()
    )
    assert list(derived.users) == ["u2", "u4"] and derived.owners.tolist() == [2, 4]
    assert derived.sizes.tolist() == [2, 1]
    tokenizer = CharTokenizer()
    for user, owner, rows, words in ((0, 2, [0, 2], ["one", "three"]), (1, 4, [1], ["new words"])):
        examples = derived.get(user, range(len(rows)))
        lengths = derived.lengths(user)
        for k, (example, row, text) in enumerate(zip(examples, rows, words, strict=True)):
            source = corpus.get(owner, [row])[0]
            np.testing.assert_array_equal(example["features"], source["features"])
            np.testing.assert_array_equal(example["labels"], tokenizer.encode(text, True))
            assert lengths["labels"][k] == len(text) + 2
            assert lengths["features"][k] == len(source["features"])
    ((chunk, _),) = ClientBatcher(
        derived, LocalBatches(2, epochs=1), make_buckets([derived]), 2, seed=0
    ).chunks([0, 1], 0)
    assert chunk.num_steps.tolist() == [1, 1]
    for bad in (-1, 2):
        with pytest.raises(IndexError):
            derived.lengths(bad)
    with pytest.raises(IndexError):
        derived.get(1, [1])


def test_corpora_that_cannot_be(corpus):
    with pytest.raises(UserError, match="nobody"):
        lib.corrected_corpus(corpus, [one("a", "b")], [None], CharTokenizer())
    for at in ((0, 1), (5, 0), (-1, 0)):
        with pytest.raises(UserError, match="no utterance"):
            lib.RelabelledCorpus(corpus, {at: np.ones(3, np.int32)})


def test_transcripts_are_by_user_and_utterance(corpus):
    """A recogniser that hears the labels backwards."""

    def evaluate(params, batch):
        length = batch["labels_length"]
        place = jnp.maximum(length[:, None] - 1 - jnp.arange(batch["labels"].shape[1]), 0)
        tokens = jnp.take_along_axis(batch["labels"], place, axis=1)
        return tokens, length, jnp.zeros(len(length)), batch["mask"]

    evaluator = Evaluator(Recogniser(None, None, evaluate), make_buckets([corpus]), batch_size=4)
    said, heard = lib.transcribe(evaluator, {}, corpus)
    assert said == [[f"{'abcde'[i]} {'xyz'[j]}" for j in range(1 + i % 3)] for i in range(5)]
    assert heard == [[text[::-1] for text in own] for own in said]
