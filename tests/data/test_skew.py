"""Utterances dealt out unevenly: everything once, as uneven as asked for, measured by hand."""

import numpy as np
import pytest

from fedasr.data.corpus import InMemoryCorpus
from fedasr.data.skew import classes_of, deal, measure, skewed, skewed_sizes
from fedasr.errors import UserError

USERS, EACH, WORDS = 20, 30, ("one", "two", "three", "four")
RNG = np.random.default_rng(0)
TEXTS = RNG.choice(WORDS, size=(USERS, EACH))


def encode(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(labels):
    return bytes(labels.astype(np.uint8)).decode()


CORPUS = InMemoryCorpus(
    {
        f"u{u:02d}": [
            {
                "features": np.full((1 + (u + i) % 7, 2), 100 * u + i, np.float32),
                "labels": encode(f"{text} five"),
            }
            for i, text in enumerate(own)
        ]
        for u, own in enumerate(TEXTS)
    }
)
SIZES = np.full(USERS, EACH)


def test_classes():
    words = classes_of(CORPUS, "words", decode)
    assert [sorted(WORDS)[c] for c in words] == TEXTS.ravel().tolist()
    np.testing.assert_array_equal(classes_of(CORPUS, "voices", decode), np.arange(600) // EACH)
    lengths = classes_of(CORPUS, "lengths", decode)
    np.testing.assert_array_equal(np.bincount(lengths), np.full(5, 120))
    own = np.array([1 + (u + i) % 7 for u in range(USERS) for i in range(EACH)])
    assert own[lengths == 0].max() <= own[lengths == 4].min()
    with pytest.raises(UserError, match=r"data\.skew='moods' is unknown"):
        classes_of(CORPUS, "moods", decode)


@pytest.mark.parametrize("alpha", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_everything_is_dealt_out_once(alpha, spread):
    classes = classes_of(CORPUS, "words", decode)
    dealt = skewed(CORPUS, classes, alpha, spread, seed=1)
    assert dealt.users == CORPUS.users
    found = [
        float(example["features"][0, 0])
        for user, size in enumerate(dealt.sizes)
        for example in dealt.get(user, range(size))
    ]
    assert sorted(found) == sorted(100.0 * u + i for u in range(USERS) for i in range(EACH))
    for user in (0, 7):
        lengths = dealt.lengths(user)["features"]
        examples = dealt.get(user, range(dealt.sizes[user]))
        assert [len(x["features"]) for x in examples] == lengths.tolist()
    assert (dealt.sizes == SIZES).all() == (spread == 0)
    again = skewed(CORPUS, classes, alpha, spread, seed=1)
    np.testing.assert_array_equal(dealt._rows, again._rows)
    assert (skewed(CORPUS, classes, alpha, spread, seed=2)._rows != dealt._rows).any()


def test_a_smaller_alpha_is_more_uneven():
    classes = classes_of(CORPUS, "words", decode)
    found = [
        measure(classes[deal(classes, SIZES, alpha, 0)], SIZES)["distance"]
        for alpha in (1e6, 10.0, 1.0, 0.05)
    ]
    assert (np.diff(found) > 0).all()
    iid = measure(classes, SIZES)["iid_distance"]
    assert abs(found[0] - iid) < 0.03 and found[-1] > 0.6
    assert measure(classes[deal(classes, SIZES, 1e-4, 0)], SIZES)["distance"] > 0.6


def test_sizes():
    found = skewed_sizes(SIZES, 1.0, 0)
    assert found.sum() == SIZES.sum() and found.min() >= 1
    big = skewed_sizes(np.full(4000, 100), 0.7, 0)
    assert abs(np.log(big - 1).std() - 0.7) < 0.05


def test_measures_by_hand():
    classes = np.array([0, 0, 1, 1, 0, 1, 0, 1])
    found = measure(classes, [2, 2, 4])
    assert found["distance"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["classes"] == 2
    # The mean difference of pairs over twice the mean.
    sizes = np.array([2, 2, 4])
    pairs = np.abs(sizes[:, None] - sizes[None]).mean()
    assert found["gini"] == pytest.approx(pairs / (2 * sizes.mean()))
    assert measure(classes, [4, 4])["gini"] == 0


def test_what_is_out_of_range():
    classes = classes_of(CORPUS, "voices", decode)
    for alpha, spread in [(0.0, 0.0), (np.nan, 0.0), (1.0, -1.0)]:
        with pytest.raises(UserError, match="skew_alpha"):
            skewed(CORPUS, classes, alpha, spread, 0)
