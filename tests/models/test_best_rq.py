import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.models import best_rq
from fedasr.models.recogniser import make_recogniser
from fedasr.models.transformer import TransformerConfig

OPTIONS = {
    "objective": "best_rq",
    "vocab": 6,
    "codes": 12,
    "features": 8,
    "dim": 16,
    "blocks": 1,
    "heads": 2,
    "mlp": 16,
    "mask_start": 0.2,
    "mask_span": 2,
    "code_dim": 4,
}
CONFIG = TransformerConfig(**OPTIONS)
LENGTHS = np.int32([22, 7, 18])


def batch(room=24, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(2, 3, size=(3, 24, 8)).astype(np.float32)
    padded = np.full((3, room, 8), 99, np.float32)  # whatever lies there does not matter
    for i, length in enumerate(LENGTHS):
        padded[i, :length] = features[i, :length]
    return {
        "features": padded,
        "features_length": LENGTHS,
        "labels": rng.integers(1, 9, (3, 4)).astype(np.int32),
        "labels_length": np.int32([4, 0, 2]),
        "mask": np.ones(3, bool),
    }


def nearest(features, width=24, dim=4, codes=12):
    """The codes of an utterance, by distances in float64."""
    projection, book = (np.asarray(x, np.float64) for x in best_rq.quantizer(width, dim, codes))
    x = features.astype(np.float64)
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    x = np.concatenate([x, np.zeros((-len(x) % 3, 8))]).reshape(-1, 24) @ projection
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return np.linalg.norm(x[:, None] - book, axis=2).argmin(axis=1)


@pytest.mark.parametrize("room", [24, 31])
def test_targets_are_the_nearest_codes(room):
    given = batch(room)
    found = np.asarray(best_rq.targets(given["features"], LENGTHS, CONFIG, -(-room // 3)))
    seen = []
    for i, length in enumerate(LENGTHS):
        expected = nearest(given["features"][i, :length])
        np.testing.assert_array_equal(found[i, : len(expected)], expected)
        seen += expected.tolist()
    assert len(set(seen)) > 4


def test_projection_and_codes_are_drawn_once():
    projection, book = best_rq.quantizer(24, 4, 12)
    np.testing.assert_allclose(np.linalg.norm(book, axis=1), 1, rtol=1e-6)
    assert np.abs(projection).max() <= np.sqrt(6 / 28) and abs(projection.mean()) < 0.1
    # Of all runs: a model that goes on elsewhere has the same codes.
    np.testing.assert_allclose(book[0], [0.626872, -0.345650, -0.178979, -0.674925], atol=1e-5)
    assert best_rq.quantizer(24, 4, 12)[0] is projection
    assert not np.allclose(best_rq.quantizer(24, 4, 13)[0], projection)


def test_spans_by_hand_and_whatever_the_padding():
    keys = jax.random.split(jax.random.key(3), 40)
    found = np.asarray(best_rq.spans(keys, 30, CONFIG))
    for key, mask in zip(keys, found, strict=True):
        begun = np.asarray(jax.random.bernoulli(key, 0.2, (30,)))
        expected = [begun[max(0, t - 1) : t + 1].any() for t in range(30)]
        np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(best_rq.spans(keys, 50, CONFIG)[:, :30], found)
    assert found[:, 1:].mean() == pytest.approx(1 - 0.8**2, abs=0.05)


class Echo:
    """An "encoder" whose scores are some of what it is shown, which it records."""

    def apply(self, variables, features, lengths, keys=None):
        self.shown = np.asarray(features)
        frames = -(-features.shape[1] // 3)
        room = jnp.pad(features, ((0, 0), (0, frames * 3 - features.shape[1]), (0, 0)))
        return room.reshape(3, frames, 24)[..., :12] * variables["params"], -(-lengths // 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_by_hand(training):
    echo, given = Echo(), batch()
    model = best_rq.recogniser(echo, CONFIG, None, lambda key: jnp.ones(()))
    if training:
        loss, aux = model.loss(jnp.ones(()), given, jax.random.key(5))
    else:
        tokens, counts, losses, valid = model.evaluate(jnp.ones(()), given)
        assert tokens.shape == (3, 1) and not counts.any()
    expected, noise = [], []
    for i, length in enumerate(LENGTHS):
        clean, shown = given["features"][i, :length], echo.shown[i]
        frames = -(-length // 3)
        mask = [(shown[3 * t] != given["features"][i, 3 * t]).any() for t in range(frames)]
        scores = np.pad(shown, ((0, 2), (0, 0)))[: 3 * frames].reshape(frames, 24)[:, :12]
        log_probs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        values = -log_probs[np.arange(frames), nearest(clean)][mask]
        expected.append(values.mean() if len(values) else None)
        for t in np.flatnonzero(mask):
            noise.append(shown[3 * t : min(3 * t + 3, length)].ravel())
    counted = [x for x in expected if x is not None]
    assert len(counted) >= 2
    if training:
        assert aux == {"utterances": len(counted), "infeasible": 3 - len(counted)}
        assert float(loss) == pytest.approx(np.mean(counted), rel=1e-5)
    else:
        np.testing.assert_array_equal(valid, [x is not None for x in expected])
        np.testing.assert_allclose(losses[valid], counted, rtol=1e-5)
    assert np.concatenate(noise).std() == pytest.approx(0.1, rel=0.3)


@pytest.fixture(scope="module")
def model():
    return make_recogniser("transformer", OPTIONS)


@pytest.fixture(scope="module")
def gradient(model):
    return jax.jit(jax.value_and_grad(model.loss, has_aux=True))


def test_neither_padding_nor_transcripts_matter(model, gradient):
    params, key = model.init(jax.random.key(1)), jax.random.key(2)
    (loss, aux), grads = gradient(params, batch(), key)
    assert aux["utterances"] >= 2 and np.isfinite(loss)
    (padded, _), padded_grads = gradient(params, batch(48), key)
    assert float(padded) == pytest.approx(float(loss), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(padded_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    other = batch() | {"labels": np.full((3, 4), 7, np.int32), "labels_length": np.int32([0, 1, 2])}
    assert gradient(params, other, key)[0][0] == loss
    (masked, _), _ = gradient(params, batch() | {"mask": np.array([True, False, False])}, key)
    assert masked != loss
    assert all(
        np.abs(g).max() > 0 for g in (grads["output"]["kernel"], grads["front_end"]["kernel"])
    )


def test_an_encoder_learns_to_tell_what_is_hidden(model, gradient):
    # Two sounds, each some frames long: what is hidden can be told from what is around it.
    rng = np.random.default_rng(3)
    sounds = rng.normal(size=(2, 8))
    given = batch()
    for i in range(3):
        given["features"][i] = sounds[i % 2] * np.linspace(0.5, 1.5, 24)[:, None]
    params, first = model.init(jax.random.key(1)), None
    for step in range(60):
        (loss, _), grads = gradient(params, given, jax.random.fold_in(jax.random.key(7), step))
        first = float(loss) if first is None else first
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    assert float(loss) < 0.6 * first


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"augment\.enabled=False"):
        make_recogniser("transformer", OPTIONS, SpecAugmentConfig())
    for options, message in (
        ({"mask_start": 0.0}, "mask_start"),
        ({"mask_start": 1.0}, "mask_start"),
        ({"mask_span": 0}, "mask_span"),
        ({"code_dim": 0}, "code_dim"),
        ({"codes": 0}, "codes"),
    ):
        with pytest.raises(UserError, match=message):
            make_recogniser("transformer", OPTIONS | options)
