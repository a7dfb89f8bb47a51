import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.feedback.histograms import client_histogram
from fedasr.feedback.weighting import quality_weight, word_weights, words_of_users
from fedasr.text import CharTokenizer

word_sets = st.lists(st.sets(st.sampled_from("abcdef"), max_size=5), min_size=1, max_size=8)


def test_words_of_users():
    encode = CharTokenizer().encode
    users = {
        "a": [{"labels": encode(text, pad_space=True)} for text in ("red box", "red")],
        "b": [{"labels": encode("oak", pad_space=True)}],
    }
    corpus = InMemoryCorpus(users, ["labels"])
    assert words_of_users(corpus, CharTokenizer()) == [{"red", "box"}, {"oak"}]


def test_weights_by_hand():
    """n(common) = 8, n(rare) = 3, n(typo) = 1; "the" is the server's."""
    words = [{"the", "common"}] * 7 + [{"rare", "common"}, {"rare"}, {"rare"}, {"typo"}, set()]
    histogram = client_histogram(words, most=9)
    weights = word_weights(words, histogram, {"the": 93}, trusted=2, power=1, floor=0.1)
    common, rare = 0.1 + 0.9 * 2 / 8, 0.1 + 0.9 * 2 / 3
    np.testing.assert_allclose(weights, [common] * 7 + [rare] * 3 + [0.1, 0.1], rtol=1e-6)
    only = word_weights([{"the"}] * 2, client_histogram([{"the"}] * 7, most=1), {"the": 93})
    np.testing.assert_allclose(only, 0.1 + 0.9 * 2 / 100, rtol=1e-6)
    flat = word_weights(words, histogram, power=0, floor=0.5)
    np.testing.assert_array_equal(flat, [1.0] * 10 + [0.5, 0.5])


@given(
    word_sets,
    st.floats(0.1, 5),
    st.floats(0, 3),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.5, 30.0]),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_weights_are_bounded_and_nobody_elses(words, trusted, power, floor, noise, seed):
    """Given the histogram, a user's words move the own weight alone: DP composes so."""
    histogram = client_histogram(words, most=3, buckets=97, noise_multiplier=noise, seed=seed)
    options = {"trusted": trusted, "power": power, "floor": floor}
    weights = word_weights(words, histogram, {"a": 7}, **options)
    assert weights.dtype == np.float32 and weights.shape == (len(words),)
    assert (weights >= np.float32(floor) * (1 - 1e-6)).all() and (weights <= 1).all()
    changed = word_weights([set(), *words[1:]], histogram, {"a": 7}, **options)
    np.testing.assert_array_equal(changed[1:], weights[1:])
    without = word_weights(words[1:], histogram, {"a": 7}, **options) if words[1:] else []
    np.testing.assert_array_equal(without, weights[1:])


@pytest.mark.parametrize(
    "bad", [{"trusted": 0}, {"power": -1}, {"floor": 1.5}, {"floor": math.nan}]
)
def test_word_weights_mistakes(bad):
    with pytest.raises(UserError):
        word_weights([{"a"}], client_histogram([{"a"}], most=1), **bad)


def evaluate(params, batch):
    """Loss (params - x)^2 of examples; the last does not count, whatever it holds."""
    losses = (params["w"] - batch["x"]) ** 2
    return None, None, losses, batch["mask"]


HELD_OUT = {"x": jnp.float32([1.0, 3.0, jnp.nan]), "mask": jnp.array([True, True, False])}


@pytest.mark.parametrize("step", [1.0, 2.0])
def test_quality_is_the_fall_of_the_held_out_loss(step):
    weigh = jax.jit(quality_weight(evaluate, HELD_OUT, temperature=0.7, step=step))

    def loss(w):
        return ((w - 1) ** 2 + (w - 3) ** 2) / 2

    found = []
    for delta in (-0.5, 0.0, 0.4, 30.0):  # old minus new
        weight = weigh({"w": jnp.float32(0)}, {"w": jnp.float32(delta)}, None, None)
        gain = (loss(0) - loss(-step * delta)) / 0.7
        np.testing.assert_allclose(weight, 1 / (1 + math.exp(min(-gain, 80))), 1e-5, 1e-30)
        found.append(float(weight))
    assert found == sorted(found, reverse=True) and found[1] == 0.5
    assert 0 <= found[-1] < 1e-3


def test_quality_mistakes():
    for bad in ({"temperature": 0.0}, {"temperature": 1.0, "step": 0.0}):
        with pytest.raises(UserError):
            quality_weight(evaluate, HELD_OUT, **bad)
