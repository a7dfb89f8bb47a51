"""The published test bed: its images, the order of its parameters, its scores."""

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from fedasr.fusion import digits


def test_images_are_centred_by_the_training_part_alone():
    raw, centred = digits.load(raw=True), digits.load()
    assert raw.train_images.shape == (1437, 64) and raw.test_images.shape == (360, 64)
    assert raw.train_images.min() == 0 and raw.train_images.max() == 16
    mean = raw.train_images.mean(0)
    np.testing.assert_allclose(centred.train_images, raw.train_images - mean, atol=1e-4)
    np.testing.assert_allclose(centred.test_images, raw.test_images - mean, atol=1e-4)
    assert abs(centred.test_images.mean(0)).max() > 0.1
    np.testing.assert_array_equal(raw.test_labels, centred.test_labels)


def test_a_model_is_one_vector_in_the_published_order():
    model = digits.random_model(jax.random.key(0))
    leaves = jax.tree.leaves(model)
    assert [leaf.shape for leaf in leaves] == [(64, 256), (256,), (256, 10), (10,)]
    assert sum(leaf.size for leaf in leaves) == 19_210
    std = np.std(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    assert std == pytest.approx(0.01, rel=0.03)


def test_scores_are_right_or_wrong_as_in_numpy():
    data = digits.load()
    model = jax.device_get(digits.random_model(jax.random.key(1), std=0.3))
    hidden = np.maximum(data.train_images @ model.hidden.kernel + model.hidden.bias, 0)
    answers = (hidden @ model.output.kernel + model.output.bias).argmax(1)
    expected = answers == data.train_labels
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(digits.train_scores(data)(model), expected)


def test_specialists_know_their_digits_alone():
    data = digits.load()
    models = jax.jit(lambda key: digits.specialists(key, data))(jax.random.key(2))
    for i, own in enumerate((data.train_labels < 5, data.train_labels >= 5)):
        scores = digits.train_scores(data)(jax.tree.map(lambda x, i=i: x[i], models))
        assert scores[own].mean() > 0.7 and scores[~own].mean() < 0.1
