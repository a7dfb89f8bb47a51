"""Recalibration as published, against NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.models import recurrent
from fedasr.models.recogniser import recurrent_recogniser
from fedasr.models.recurrent import RecurrentConfig
from fedasr.training import corp
from fedasr.training import days as lib
from fedasr.training.corp import CorpConfig, Labelled

MODEL = RecurrentConfig(
    vocab=4, features=3, units=4, layers=1, subsample=1, dropout=0.0, l2=0.01, l2_on="inputs"
)
BUCKET = {"features": 12, "labels": 4}
SMALL = CorpConfig(batch_size=6, white_noise=0.0)


def sentences(day, count=5):
    rng = np.random.default_rng(day)
    return [
        Labelled(
            day,
            {
                "features": rng.normal(size=(int(rng.integers(8, 13)), 3)).astype(np.float32),
                "labels": rng.integers(1, 4, 2).astype(np.int32),
            },
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def params():
    stacked = lib.stack_days(recurrent.init(jax.random.key(0), MODEL), 3)
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 3, 3)).astype(np.float32)
    return {**stacked, "day": {**stacked["day"], "kernel": stacked["day"]["kernel"] + noise}}


@pytest.fixture(scope="module")
def step():
    return corp.make_step(MODEL, SMALL, corp.optimizer_of(SMALL))


def test_a_step_is_the_published_one(params, step):
    """Gradients sentence by sentence through its own day's layer; then clip and Adam, in NumPy."""
    picked = [*sentences(2, 2), *sentences(0, 2), *sentences(1, 2)]
    quiet = dataclasses.replace(MODEL, white_noise=0.0, offset_noise=0.0, walk_noise=0.0, l2=0.0)
    recogniser = recurrent_recogniser(quiet)
    alone = jax.jit(jax.value_and_grad(lambda p, b: recogniser.loss(p, b, jax.random.key(9))[0]))
    each = []
    for sentence in picked:
        batch = lib.day_batch([sentence.example], sentence.day, BUCKET, 1)
        del batch["day"]
        each.append(jax.device_get(alone(lib.with_day(params, sentence.day), batch)))
    loss = sum(float(value) for value, _ in each) / 6
    shared = jax.tree.map(lambda *g: sum(map(np.float64, g)) / 6, *[g["shared"] for _, g in each])
    today = jax.tree.map(lambda *g: sum(map(np.float64, g)) / 6, *[g["day"] for _, g in each[:2]])
    before = {"shared": params["shared"], "day": lib.with_day(params, 2)["day"]}
    kernels = [before["day"]["kernel"], before["shared"]["gru_0"]["input"]]
    loss += 0.01 * sum(float((np.asarray(k, np.float64) ** 2).sum()) for k in kernels)
    today["kernel"] += 0.02 * np.asarray(kernels[0])
    shared["gru_0"]["input"] += 0.02 * np.asarray(kernels[1])
    grads = {"shared": shared, "day": today}
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * min(1.0, 10 / norm), grads)
    moved = jax.tree.map(  # the first step of Keras' Adam
        lambda g: 0.01 * np.sqrt(0.001) / 0.1 * 0.1 * g / (np.sqrt(0.001) * np.abs(g) + 0.1), grads
    )
    state = corp.optimizer_of(SMALL).init(corp.trained_part(params, 2))
    after, _, value = step(params, state, corp.mixed_batch(picked, BUCKET), 2, jax.random.key(0))
    assert float(value) == pytest.approx(loss, rel=1e-5)
    found = {"shared": after["shared"], "day": lib.with_day(after, 2)["day"]}
    jax.tree.map(
        lambda a, b, m: np.testing.assert_allclose(np.asarray(b) - a, m, atol=1e-6),
        found,
        before,
        moved,
    )
    assert max(np.abs(m).max() for m in jax.tree.leaves(moved)) > 1e-4
    for day in (0, 1):  # no other day's layer is trained
        for name in ("kernel", "bias"):
            np.testing.assert_array_equal(after["day"][name][day], params["day"][name][day])


def test_only_white_noise_is_added():
    noisy = dataclasses.replace(MODEL, offset_noise=50.0, walk_noise=50.0, drift_noise=50.0)
    batch = corp.mixed_batch(sentences(1, 2), BUCKET)
    stacked = lib.stack_days(recurrent.init(jax.random.key(0), MODEL), 3)

    for config in (SMALL, dataclasses.replace(SMALL, white_noise=0.8)):
        loss = jax.jit(corp.mixed_loss(noisy, config))
        values = [float(loss(stacked, batch, 1, jax.random.key(key))) for key in (0, 1)]
        assert (values[0] == values[1]) == (config is SMALL)


def test_batches_mix_days_by_sentence():
    options = CorpConfig(batch_size=64)
    past = [*sentences(0, 40), *sentences(1, 7)]
    stream = corp.draws(sentences(2, 3), past, options, np.random.default_rng(0))
    batches = [next(stream) for _ in range(30)]
    numbers = np.array([[s.day for s in batch] for batch in batches])
    assert all(len(set(row)) > 1 for row in numbers)
    # Three standard deviations of a binomial count.
    assert abs((numbers == 2).mean() - 0.6) < 3 * np.sqrt(0.24 / numbers.size)
    # Pooled: a day counts as much as it has sentences, each once a pass.
    earlier = [id(s.example) for batch in batches for s in batch if s.day != 2]
    for start in range(0, len(earlier) - 47, 47):
        assert len(set(earlier[start : start + 47])) == 47
    alone = next(corp.draws(sentences(2, 3), [], options, np.random.default_rng(0)))
    assert {s.day for s in alone} == {2}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0] * 9, 2),  # not after the first
        ([6.0, 1.0, 9.0], 2),  # the mean of those that there are
        ([9.0] * 300, 201),
        ([30.0, *[3.0] * 20], 11),  # until the first is not among the last 10
    ],
)
def test_training_stops_as_published(values, expected):
    stream = iter(values)

    def counted(params, state, batch, day, key):
        return params + 1, state, next(stream)

    batches = iter(lambda: {}, None)
    found, _, losses = corp.trained_on(counted, 0, (), batches, 0, CorpConfig(), jax.random.key(0))
    assert found == len(losses) == expected


def test_a_day_is_decoded_and_trained_on_sentence_by_sentence(params):
    """What is decoded first is of the layer as it was, later ones of what was trained."""
    texts = iter(["ab", "", "abab ab"])
    calls = []

    def spy(stacked, state, batch, day, key):
        calls.append((int(state), sorted(set(batch["day"].tolist())), batch["labels"].max()))
        return {**stacked, "shared": stacked["shared"]}, state + 1, 1.0

    class Fresh:
        init = staticmethod(lambda trained: 0)

    arriving = [{"features": s.example["features"]} for s in sentences(2, 3)]
    _, today, told = corp.recalibrate_day(
        spy,
        Fresh,
        params,
        2,
        arriving,
        sentences(0),
        lambda own, examples: [np.zeros((2, 4))],
        lambda scores: next(texts),
        lambda text: np.int32([" ab".index(c) + 1 for c in text]),
        BUCKET,
        dataclasses.replace(SMALL, batch_size=24),
        0,
    )
    assert [t.text for t in told] == ["ab", "", "abab ab"]
    # A space where nothing was decoded; what has no room is not trained on.
    assert [s.example["labels"].tolist() for s in today] == [[2, 3], [1]]
    assert [len(t.losses) for t in told] == [2, 2, 2]
    assert [state for state, *_ in calls] == list(range(6))  # one optimiser all day
    assert all(days == [0, 2] for _, days, _ in calls)
    with pytest.raises(UserError, match="today"):
        CorpConfig(today=0.0)
