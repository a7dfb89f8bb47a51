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


def test_the_published_pair_is_that_of_the_public_code():
    """As one vector drawn from key 42, with Adam by its formula in float64."""
    data = digits.load(raw=True)
    found = jax.jit(lambda key: digits.specialists(None, data))(jax.random.key(5))

    def loss(flat, images, labels):
        hidden = jax.nn.relu(images @ flat[: 64 * 256].reshape(64, 256) + flat[64 * 256 : 65 * 256])
        kernel, bias = flat[65 * 256 : -10].reshape(256, 10), flat[-10:]
        logs = jax.nn.log_softmax(hidden @ kernel + bias)
        return -logs[np.arange(len(labels)), labels].mean()

    gradient = jax.jit(jax.grad(loss))
    for i, key in enumerate(jax.random.split(jax.random.PRNGKey(42), 2)):
        own = (data.train_labels < 5) == (i == 0)
        images, labels = data.train_images[own], data.train_labels[own]
        flat = 0.01 * jax.random.normal(key, (19_210,))
        start = np.concatenate([np.ravel(x[i]) for x in jax.tree.leaves(digits.published_starts())])
        np.testing.assert_array_equal(start, flat)
        mean = square = np.zeros(19_210)
        flat = np.float64(flat)
        for step in range(1, 11):
            g = np.float64(gradient(np.float32(flat), images, labels))
            mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
            unbiased = np.sqrt(square / (1 - 0.999**step)) + 1e-8
            flat = flat - 3e-3 * mean / (1 - 0.9**step) / unbiased
        ours = np.concatenate([np.ravel(x[i]) for x in jax.tree.leaves(found)])
        # Where a gradient is about 0 its sign is rounding, and Adam's step follows it.
        assert np.mean(np.abs(ours - flat) > 1e-5) < 0.01


def test_seeds_share_the_published_pair_or_have_their_own():
    from fedasr.fusion.tasks import digits_task

    keys = jax.random.split(jax.random.key(0), 2)
    for per_seed in (False, True):
        task = digits_task(True, raw=True, pair_per_seed=per_seed)
        make = jax.jit(task.make_parents)
        one, two = (jax.tree.leaves(make(key))[0] for key in keys)
        assert bool((one == two).all()) is not per_seed
        assert task.identity["pair"] == ("per seed" if per_seed else "published")


def test_specialists_know_their_digits_alone():
    data = digits.load()
    models = jax.jit(lambda key: digits.specialists(key, data))(jax.random.key(2))
    for i, own in enumerate((data.train_labels < 5, data.train_labels >= 5)):
        scores = digits.train_scores(data)(jax.tree.map(lambda x, i=i: x[i], models))
        assert scores[own].mean() > 0.7 and scores[~own].mean() < 0.1
