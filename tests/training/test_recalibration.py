import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.models.recogniser import recurrent_recogniser
from fedasr.models.recurrent import RecurrentConfig
from fedasr.training import days as lib
from fedasr.training.days import DayData
from fedasr.training.recalibration import (
    RecalibrationConfig,
    mixed_batches,
    pseudo_labelled,
    recalibrate,
)

CONFIG = RecurrentConfig(
    vocab=4, features=3, units=4, layers=1, subsample=1, window=1, white_noise=0.1, dropout=0.0
)
BUCKET = {"features": 12, "labels": 4}


def day(number, count=5):
    rng = np.random.default_rng(number)
    return DayData(
        number,
        [
            {
                "features": rng.normal(size=(int(rng.integers(8, 13)), 3)).astype(np.float32),
                "labels": rng.integers(1, 4, 2).astype(np.int32),
            }
            for _ in range(count)
        ],
    )


@pytest.fixture(scope="module")
def recogniser():
    return recurrent_recogniser(CONFIG)


@pytest.fixture
def params(recogniser):
    stacked = lib.stack_days(recogniser.init(jax.random.key(0)), 3)
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 3, 3)).astype(np.float32)
    return {**stacked, "day": {**stacked["day"], "kernel": stacked["day"]["kernel"] + noise}}


def test_a_batch_trains_the_layer_of_its_day_only(recogniser, params):
    batch = lib.day_batch(day(1).examples, 1, BUCKET, 6)
    key = jax.random.key(5)
    loss = lambda p, b: lib.by_day(recogniser.loss)(p, b, key)[0]  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    alone = {name: x for name, x in batch.items() if name != "day"}
    expected, own = jax.jit(jax.value_and_grad(lambda p: recogniser.loss(p, alone, key)[0]))(
        lib.with_day(params, 1)
    )
    assert value == pytest.approx(float(expected), rel=1e-6)
    for name in ("kernel", "bias"):
        assert np.abs(np.asarray(grads["day"][name])[[0, 2]]).max() == 0
        np.testing.assert_allclose(grads["day"][name][1], own["day"][name], atol=1e-6)


def test_a_day_has_one_number_in_all_splits():
    """Also where a split has no sentences of some days."""
    few = InMemoryCorpus({"2001.03": day(0).examples, "2001.01": day(1).examples[:2]})
    found = lib.days_of(few, ["2001.01", "2001.02", "2001.03"])
    assert list(found) == [0, 2]
    assert [(data.day, len(data.examples)) for data in found.values()] == [(0, 2), (2, 5)]
    with pytest.raises(UserError, match=r"2001\.03"):
        lib.days_of(few, ["2001.01", "2001.02"])


def test_a_new_day_begins_like_another_a_mean_or_the_identity(params):
    kernels = np.asarray(params["day"]["kernel"])
    for like, expected in ((0, kernels[0]), ([0, 1], kernels[:2].mean(0)), (None, np.eye(3))):
        found = lib.set_day(jax.device_get(params), 2, like)  # as checkpoints give them
        np.testing.assert_allclose(found["day"]["kernel"][2], expected, atol=1e-7)
        np.testing.assert_array_equal(found["day"]["kernel"][:2], kernels[:2])


def test_calibration_of_the_day_alone_leaves_the_rest(recogniser, params):
    optimizer = lib.published_optimizer(0.5, 3)
    step = lib.make_step(lib.by_day(recogniser.loss), optimizer, day_only=True)
    options = RecalibrationConfig(steps=3, today=1.0, batch_size=4, threshold=0.0)
    found, losses = recalibrate(step, optimizer, params, day(2), [], BUCKET, options, 0)
    assert len(losses) == 3
    jax.tree.map(np.testing.assert_array_equal, found["shared"], params["shared"])
    np.testing.assert_array_equal(found["day"]["kernel"][:2], params["day"]["kernel"][:2])
    assert np.abs(found["day"]["kernel"][2] - params["day"]["kernel"][2]).max() > 1e-4


def counted_step(values):
    """A step that only gives the next of these losses and counts itself in the parameters."""
    stream = iter(values)
    return lambda p, s, b, k: (p + 1, s, jnp.float32(next(stream)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([9.0] * 20, 12), ([9.0, 1, 1, 1, 9, 9, *[1] * 9], 4), ([1.0] * 20, 3), ([2.0] * 20, 12)],
)
def test_training_stops_when_the_last_losses_are_low(values, expected):
    # A window of 3 below 2; 9, 1, 1 is not yet, 1, 1, 1 is; a mean of just 2 is not below.
    options = RecalibrationConfig(steps=12, batch_size=2, threshold=2.0, window=3)
    found, losses = recalibrate(
        counted_step(values), optax.sgd(0.1), 0, day(2), [day(0)], BUCKET, options, 0
    )
    assert found == len(losses) == expected
    assert losses == values[:expected]


def test_batches_mix_today_with_single_earlier_days():
    options = RecalibrationConfig(steps=400, today=0.6, batch_size=4)
    past = [day(0), day(1, count=2)]
    found = list(mixed_batches(day(2), past, options, BUCKET, 0))
    number = np.array([batch["day"][0] for batch in found])
    assert all((batch["day"] == batch["day"][0]).all() for batch in found)
    # Three standard deviations of a binomial count.
    assert abs((number == 2).mean() - 0.6) < 3 * np.sqrt(0.24 / 400)
    assert abs((number == 0).mean() - 0.2) < 3 * np.sqrt(0.16 / 400)
    assert {int(b["mask"].sum()) for b, n in zip(found, number, strict=True) if n == 1} == {2}
    again = list(mixed_batches(day(2), past, options, BUCKET, 0))
    jax.tree.map(np.testing.assert_array_equal, found[7], again[7])
    assert any((b["day"][0] != 2) for b in found)
    assert {b["day"][0] for b in mixed_batches(day(2), [], options, BUCKET, 0)} == {2}
    never = RecalibrationConfig(steps=50, today=0.0, batch_size=4)
    assert {int(b["day"][0]) for b in mixed_batches(day(2), past, never, BUCKET, 0)} == {0, 1}
    first, second = (list(mixed_batches(day(2), past, options, BUCKET, 0, part)) for part in (0, 1))
    assert any((a["features"] != b["features"]).any() for a, b in zip(first, second, strict=True))


def test_pseudo_labels_never_read_the_labels():
    data = [{"features": e["features"]} for e in day(0, 4).examples]
    texts = iter(["ab", "", "b", "abab"])
    found = pseudo_labelled(
        data,
        [np.zeros((2, 4))] * 4,
        lambda scores: next(texts),
        lambda text: np.int32([" ab".index(c) for c in text]),
        3,
    )
    assert [x["labels"].tolist() for x in found] == [[1, 2], [2]]
    assert found[1]["features"] is data[2]["features"]
    options = RecalibrationConfig(steps=2, batch_size=2)
    same, losses = recalibrate(None, None, "p", DayData(1, []), [day(0)], BUCKET, options, 0)
    assert (same, losses) == ("p", [])


def test_scores_are_those_of_the_recogniser_in_any_batches(recogniser, params):
    data = day(0, 5)
    own = lib.with_day(params, 0)
    found = lib.Scorer(CONFIG, BUCKET, 2)(own, data.examples)
    assert [len(s) for s in found] == [len(e["features"]) for e in data.examples]
    batch = lib.day_batch(data.examples, 0, BUCKET, 5)
    tokens, counts, *_ = jax.jit(recogniser.evaluate)(own, batch)
    for i, scores in enumerate(found):
        np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, atol=1e-5)
        assert lib.greedy_labels(scores).tolist() == tokens[i, : counts[i]].tolist()
    with pytest.raises(UserError, match="no sentences"):
        lib.Scorer(CONFIG, BUCKET)(own, [])


def test_batches_of_training_are_a_function_of_the_step():
    data = [day(0), day(1), day(2)]
    found = list(lib.batches(data, BUCKET, 3, 0, 30))
    assert {int(b["day"][0]) for b in found} == {0, 1, 2}
    longer = list(lib.batches(data, BUCKET, 3, 0, 40))
    for a, b in zip(found, longer[:30], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_greedy_labels_collapse_repeats_then_blanks():
    path = [1, 1, 0, 1, 2, 2, 0, 0, 3]
    assert lib.greedy_labels(np.eye(4)[path]).tolist() == [1, 1, 2, 3]


def test_mistakes():
    with pytest.raises(UserError, match="today"):
        RecalibrationConfig(today=-0.1)
