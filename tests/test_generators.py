"""What is drawn below a training step's key: as good as independent, and the same in any batch."""

import dataclasses

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr import generators
from fedasr.errors import UserError
from fedasr.generators import HASHED, DrawingConfig, drawing
from fedasr.models import layers
from fedasr.models.recogniser import make_recogniser, model_configs

STEPS = SLOTS = PLACES = 8
SHAPE = (32, 64)  # frames and features
CONFIG = DrawingConfig("hashed")


def hashed(*words):
    return jax.random.wrap_key_data(jnp.uint32(words), impl=HASHED)


def mixed(x):
    """The hash in Python's whole numbers, of which these streams consist for good."""
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def word(index, first, second):
    return mixed((mixed(index ^ first) + second) % 2**32)


def child(key, data, constants):
    first = key[0] ^ word(data, key[1], constants[0])
    return [first, key[1] ^ word(data, first, constants[1])]


def test_the_streams_are_these_for_good():
    words = [0x12345678, 0x9ABCDEF0]
    key = hashed(*words)
    bits = np.asarray(jax.random.bits(key, (3, 4))).ravel()
    assert bits.tolist() == [word(i, *words) for i in range(12)]
    bytes_ = np.asarray(jax.random.bits(key, (3, 4), "uint8")).ravel()
    assert bytes_.tolist() == [word(i, *words) >> 24 for i in range(12)]
    for data in (0, 7, 0x9D1A_0206):
        folded = jax.random.key_data(jax.random.fold_in(key, np.uint32(data)))
        assert folded.tolist() == child(words, data, (0x9E3779B9, 0xBB67AE85))
    halves = jax.random.key_data(jax.random.split(key)).tolist()
    assert halves == [child(words, i, (0xC2B2AE35, 0xA54FF53A)) for i in range(2)]
    with jax.enable_x64(True):
        wide = jax.random.bits(key, (2,), "uint64").tolist()
    assert wide == [word(2 * i, *words) << 32 | word(2 * i + 1, *words) for i in range(2)]


def test_keys_become_hashed_by_their_words_and_only_where_asked():
    key = jax.random.key(5)
    assert drawing(key, None) is key and drawing(key, DrawingConfig()) is key
    found = drawing(jax.random.split(key, 3), CONFIG)
    assert found.shape == (3,) and "hsh" in str(found.dtype)
    words = jax.random.key_data(jax.random.split(key, 3))
    np.testing.assert_array_equal(jax.random.key_data(found), words)


def test_no_two_children_of_a_key_agree_with_each_other_or_with_what_it_draws():
    key = hashed(0, 0)
    count = 1 << 16
    folded = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    children = np.concatenate(
        [jax.random.key_data(folded), jax.random.key_data(jax.random.split(key, count))]
    )
    assert len(np.unique(children, axis=0)) == 2 * count
    words = np.asarray(jax.random.bits(key, (count,)))
    assert len(np.unique(words)) == count  # of one key no word comes twice
    # By chance a word is another's with probability 2**-32 each: one of 2**33 pairs or so.
    for half in (children[:count, 0], children[:count, 1], children[count:, 0]):
        assert np.isin(half, words).sum() < 16
        assert (half == words).sum() < 3


WEAK = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=jax.extend.random.threefry_prng_impl.seed,
    split=jax.extend.random.threefry_prng_impl.split,
    random_bits=lambda key, width, shape: (
        generators._indices(shape) * np.uint32(0x9E3779B1) + key[0]
    ),
    fold_in=lambda key, data: key + data * np.uint32(0x85EBCA6B),
    name="weak",
    tag="weak",
)


def draws(impl):
    """Words uint32 [steps, utterances, places, frames, features], by keys as models make them."""

    def nested(key, counts):
        if not counts:
            return jax.random.bits(key, SHAPE)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(counts[0]))
        return jax.vmap(lambda k: nested(k, counts[1:]))(keys)

    def of_step(words):
        return nested(jax.random.wrap_key_data(words, impl=impl), (SLOTS, PLACES))

    steps = jax.random.key_data(jax.random.split(jax.random.key(1), STEPS))
    return np.asarray(jax.jit(jax.vmap(of_step))(steps))


def deviations(words):
    """How far from independent fair draws: figures that are standard normal, or nearly."""
    drop = (words < np.uint32(0.3 * 2**32)).astype(np.float64)
    x = (drop - 0.3) / np.sqrt(0.3 * 0.7)
    flat = x.reshape(-1, SHAPE[0] * SHAPE[1])  # masks of one utterance in one place and step
    count, size = flat.shape
    found = {"mean": flat.mean() * np.sqrt(flat.size)}
    # Their counts vary as binomial ones do: neither more, nor less.
    found["variance of counts"] = ((flat.sum(1) ** 2 / size).mean() - 1) * np.sqrt(count / 2)
    for axis, name in enumerate(("step", "utterance", "place", "frame", "feature")):
        for lag in (1, 2, 4):
            near = np.take(x, np.arange(lag, x.shape[axis]), axis)
            here = np.take(x, np.arange(x.shape[axis] - lag), axis)
            found[f"{name} {lag} further"] = (near * here).sum() / np.sqrt(near.size)
    between = (flat @ flat.T / np.sqrt(size))[np.triu_indices(count, 1)]
    found["any two masks"] = ((between**2).mean() - 1) * np.sqrt(len(between) / 2)
    found["the two most alike"] = max(abs(between).max() - 5.5, 0)
    histogram = np.bincount(words.ravel() >> 24, minlength=256) / words.size * 256
    found["bytes"] = (((histogram - 1) ** 2).sum() * words.size / 256 - 255) / np.sqrt(510)
    per_bit = np.array([(words >> i & 1).mean() for i in range(32)])
    found["bits"] = (((2 * per_bit - 1) ** 2).sum() * words.size - 32) / 8
    change = words[..., 1:] ^ words[..., :-1]
    per_bit = np.array([(change >> i & 1).mean() for i in range(32)])
    found["bits of neighbours"] = (((2 * per_bit - 1) ** 2).sum() * change.size - 32) / 8
    return found


@pytest.mark.parametrize("name", ["hashed", "threefry"])
def test_draws_are_independent_over_steps_utterances_places_and_elements(name):
    found = deviations(draws(HASHED if name == "hashed" else "threefry2x32"))
    assert not {what: far for what, far in found.items() if abs(far) > 4.5}, found


def test_a_weak_generator_is_found_out():
    found = deviations(draws(WEAK))
    assert sum(abs(far) > 4.5 for far in found.values()) > 5, found


def test_a_mask_is_the_same_however_utterances_are_batched_and_padded():
    keys = drawing(jax.random.split(jax.random.key(2), 6), CONFIG)
    x = jnp.ones((6, 9, 4))
    whole = np.asarray(layers.dropout(x, 0.4, keys))
    assert 0.2 < (whole == 0).mean() < 0.6
    np.testing.assert_allclose(np.unique(whole), [0, 1 / 0.6], rtol=1e-6)
    for first, last in ((0, 2), (2, 3), (3, 6)):
        part = layers.dropout(x[first:last], 0.4, keys[first:last])
        np.testing.assert_array_equal(part, whole[first:last])
    padded = layers.dropout(jnp.ones((6, 14, 4)), 0.4, keys)
    np.testing.assert_array_equal(padded[:, :9], whole)
    clients = jax.jit(jax.vmap(lambda x, k: layers.dropout(x, 0.4, k)))
    chunked = clients(x.reshape(2, 3, 9, 4), keys.reshape(2, 3))
    np.testing.assert_array_equal(np.asarray(chunked).reshape(whole.shape), whole)


TINY = {"vocab": 6, "features": 8, "dim": 8, "blocks": 1, "heads": 1, "mlp": 8,
        "dropout": 0.3, "cape_shift": 1.0, "generator": "hashed"}  # fmt: skip


def test_a_models_loss_does_not_depend_on_padding_and_differs_from_the_other_generators():
    rng = np.random.default_rng(0)

    def batch(slots, frames, labels):
        found = {
            "features": np.full((slots, frames, 8), 7.0, np.float32),
            "features_length": np.int32([18, 12] + [0] * (slots - 2)),
            "labels": np.zeros((slots, labels), np.int32),
            "labels_length": np.int32([3, 2] + [0] * (slots - 2)),
            "mask": np.arange(slots) < 2,
        }
        found["features"][:2, :18] = features
        found["labels"][:2, :3] = [[1, 2, 3], [4, 5, 0]]
        return found

    features = rng.standard_normal((2, 18, 8)).astype(np.float32)
    model = make_recogniser("transformer", TINY)
    params = model.init(jax.random.key(0))
    loss = jax.jit(lambda *args: model.loss(*args)[0])
    keys = [jax.random.key(i) for i in range(2)]
    found = [float(loss(params, batch(2, 18, 3), key)) for key in keys]
    padded = [float(loss(params, batch(3, 27, 5), key)) for key in keys]
    np.testing.assert_allclose(found, padded, rtol=1e-5)
    other = make_recogniser("transformer", {**TINY, "generator": "threefry"}).loss
    assert abs(found[0] - found[1]) > 1e-3
    assert abs(found[0] - float(other(params, batch(2, 18, 3), keys[0])[0])) > 1e-3


def test_every_model_has_the_option_and_refuses_another():
    for name, config in model_configs().items():
        assert {field.name: field for field in dataclasses.fields(config)}["generator"].default == (
            "threefry"
        ), name
        with pytest.raises(UserError, match="generator must be one of"):
            config(generator="philox")
