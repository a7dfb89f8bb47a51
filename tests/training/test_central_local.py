"""Central training in which every user keeps local parameters, such as a recording day's layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.data import neural
from fedasr.data.batching import UserBatcher, make_buckets
from fedasr.data.corpus import InMemoryCorpus
from fedasr.data.neural import synthetic
from fedasr.data.records import open_corpus
from fedasr.errors import UserError
from fedasr.federated.local import LocalStore, make_layout
from fedasr.federated.server import make_optimizer
from fedasr.recipes.neural import get_config
from fedasr.streams import Stream, seed_key
from fedasr.training import loop
from fedasr.training.central_local import LocalCentralTraining
from fedasr.training.checkpoint import restore_params
from fedasr.training.logging import RunLogger
from fedasr.training.rows import local_rows
from fedasr.training.session import Session
from fedasr.training.trainers.central_local import write_rows

PARAMS = {"day": {"a": np.float32([1.0, 0.5])}, "shared": {"v": np.float32([0.5, -1.0])}}
LAYOUT = make_layout(PARAMS, ["^day/"])


def squares(params, batch, key):
    """Squared error of (day layer, then shared layer) with label noise of the step's key."""
    error = (batch["x"] * params["day"]["a"]) @ params["shared"]["v"] - batch["y"]
    error = error + 0.1 * jax.random.normal(key, error.shape)
    return jnp.sum(jnp.where(batch["mask"], error**2, 0.0)) / jnp.sum(batch["mask"]), {}


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    users = {
        f"u{i}": [
            {"x": rng.normal(size=2).astype(np.float32), "y": np.float32(rng.normal())}
            for _ in range(size)
        ]
        for i, size in enumerate([5, 2, 4])
    }
    return InMemoryCorpus(users)


def training(corpus, **options):
    chain = make_optimizer("keras_adam", 0.1, eps=0.1)
    return LocalCentralTraining(corpus, squares, chain, LAYOUT, 3, seed=1, **options)


def test_steps_are_those_of_a_plain_loop(corpus):
    """In NumPy: Adam over everything, with a gradient of zero for all users but the batch's."""
    found = training(corpus, steps_per_report=7)
    state = found.init(PARAMS)
    *_, (state, done, _) = found.run(state, 7)
    assert done == 7 == int(state.round)
    batcher = UserBatcher(corpus, (), 1, batch_size=3)
    v, rows = PARAMS["shared"]["v"].astype(float), np.tile(PARAMS["day"]["a"], (3, 1)).astype(float)
    moments = {name: [np.zeros_like(x), np.zeros_like(x)] for name, x in (("v", v), ("r", rows))}
    seen = set()
    for step in range(7):
        batch = batcher.batch(step)
        user = int(batch["user"][0])
        seen.add(user)
        key = jax.random.fold_in(seed_key(1, Stream.CENTRAL), step)
        noise = 0.1 * np.asarray(jax.random.normal(key, (3,)))
        x, mask = batch["x"].astype(float), batch["mask"]
        error = np.where(mask, (x * rows[user]) @ v - batch["y"] + noise, 0)
        scale = 2 * error / mask.sum()
        by_row = np.zeros_like(rows)
        by_row[user] = (scale[:, None] * x * v).sum(0)
        by_v = (scale[:, None] * x * rows[user]).sum(0)
        t = step + 1
        for name, value, g in (("v", v, by_v), ("r", rows, by_row)):
            m, n = moments[name]
            m[:], n[:] = 0.9 * m + 0.1 * g, 0.999 * n + 0.001 * g**2
            value -= 0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(n) + 0.1)
    assert seen == {0, 1, 2}
    np.testing.assert_allclose(state.params["shared"]["v"], v, atol=1e-6)
    np.testing.assert_allclose(found.rows(state), rows, atol=1e-6)
    np.testing.assert_array_equal(state.params["day"]["a"], PARAMS["day"]["a"])
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


def test_batches_are_of_one_user_and_a_function_of_the_step(corpus):
    batcher = UserBatcher(corpus, (), 0, batch_size=3, multiple=2)
    batches = [batcher.batch(step) for step in range(60)]
    users = np.array([batch["user"][0] for batch in batches])
    assert all((batch["user"] == u).all() for batch, u in zip(batches, users, strict=True))
    assert {batch["mask"].shape for batch in batches} == {(4,)}
    counts = {int(u): int(b["mask"].sum()) for u, b in zip(users, batches, strict=True)}
    assert counts == {0: 3, 1: 2, 2: 3}
    # Each alike, whatever they have: three standard deviations.
    assert all(abs((users == u).mean() - 1 / 3) < 3 * np.sqrt(2 / 9 / 60) for u in counts)
    again = UserBatcher(corpus, (), 0, batch_size=3, multiple=2).batch(41)
    jax.tree.map(np.testing.assert_array_equal, again, batches[41])


def test_padding_is_counted():
    rng = np.random.default_rng(0)
    lengths = {"u": [3, 8], "v": [5]}
    users = {
        name: [{"x": rng.normal(size=(n, 2)).astype(np.float32)} for n in each]
        for name, each in lengths.items()
    }
    corpus = InMemoryCorpus(users)
    batcher = UserBatcher(corpus, make_buckets([corpus], 1), 0, batch_size=2)
    expected = sum(int(batcher.batch(step)["x_length"].sum()) for step in range(5))
    found = batcher.padding(5)
    assert (found.real, found.computed) == (expected, 5 * 2 * 8)


def test_rows_of_a_step_are_written_once_and_an_earlier_step_is_found_again(corpus, tmp_path):
    found = training(corpus)
    states = [found.init(PARAMS)]
    for state, *_ in found.run(states[0], 20):
        states.append(state)
    with LocalStore(tmp_path, LAYOUT, 3) as store:
        for state in states[1:]:
            write_rows(store, found, state)
            size = (tmp_path / "rows.f32").stat().st_size
            write_rows(store, found, state)
            assert (tmp_path / "rows.f32").stat().st_size == size
        assert store.round == 20
        init = np.zeros(2, np.float32)
        np.testing.assert_array_equal(store.gather(range(3), init), found.rows(states[2]))
        store.restore(10, forget=False)
        np.testing.assert_array_equal(store.gather(range(3), init), found.rows(states[1]))
        store.restore(20)
        np.testing.assert_array_equal(store.gather(range(3), init), found.rows(states[2]))
        with pytest.raises(UserError, match="not before"):
            store.advance(20)


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    pytest.importorskip("scipy", reason="scipy is not installed")
    folder = tmp_path_factory.mktemp("days")
    sizes = {"days": 3, "train_sentences": 4, "test_sentences": 2, "words": (3, 3)}
    recordings = synthetic.NeuralConfig(**sizes, electrodes=3, informative=3)
    synthetic.generate(recordings, folder / "recordings")
    source = neural.NeuralSessions(
        folder / "recordings", neural.parse_areas("tx1[0:3],spikePow[0:3]")
    )
    neural.prepare_sessions(source, folder / "corpus", stride=4)
    return folder / "corpus"


@pytest.fixture
def configure(days):
    def make(**changes):
        config = get_config("training=central")
        config.data.dir = str(days)
        config.model.options.update(
            features=6, units=4, layers=1, window=2, stride=2, subsample=2, white_noise=0.1
        )
        config.central.steps = 20
        config.central.batch_size = 2
        config.evaluation.every_steps = 10
        config.checkpoint.seed_every = 10
        config.selection.split = changes.get("selection.split", "test")
        config.devices = 1
        config.update_from_flattened_dict(changes)
        return config.to_dict()

    return make


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_been_stopped(configure, days, tmp_path, monkeypatch):
    summary = loop.run(configure(), tmp_path / "whole")
    assert summary["local"]["users"] == 3
    assert summary["local"]["parameters"] == 6 * 6 + 6
    logged = RunLogger.step

    def die(self, step, record):
        if step == 20:
            raise RuntimeError("killed")
        return logged(self, step, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "step", die)
        with pytest.raises(RuntimeError, match="killed"):
            loop.run(configure(), tmp_path / "died")
    resumed = loop.run(configure(), tmp_path / "died")
    assert resumed["cer"] == summary["cer"] and resumed["local"] == summary["local"]
    corpus = open_corpus(days, "test")
    rows = []
    for name in ("whole", "died"):
        params = restore_params(tmp_path / name)
        _, found = local_rows(tmp_path / name, params, corpus, days)
        rows.append(found(np.arange(3)))
    np.testing.assert_array_equal(*rows)
    # A layer for each day, and that of the model itself was not trained.
    assert np.abs(rows[0][0] - rows[0][1]).max() > 1e-6
    np.testing.assert_array_equal(params["day"]["kernel"], np.eye(6))


def test_the_best_state_keeps_its_rows(configure, days, tmp_path, monkeypatch):
    """As published: the checkpoint that is best on a split, whatever came after it."""
    alone = loop.run(configure(**{"central.steps": 10, "selection.split": ""}), tmp_path / "ten")
    rates = iter([90.0, 50.0, 70.0])
    evaluate = Session.evaluate

    def told(self, params, splits=None):
        found = evaluate(self, params, splits)
        return {k: {**v, "wer": next(rates, v["wer"])} for k, v in found.items()}

    monkeypatch.setattr(Session, "evaluate", told)
    summary = loop.run(configure(), tmp_path / "best")
    assert summary["selection"]["units"] == 10 and summary["central_steps"] == 20
    assert summary["cer"] == alone["cer"]
    assert summary["side_channel_failures"] == {}  # the report is written
    found = []
    for name in ("ten", "best"):
        params = restore_params(tmp_path / name)
        _, rows = local_rows(tmp_path / name, params, open_corpus(days, "test"), days)
        found.append((params, rows(np.arange(3))))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    "change",
    [{"central.batch_seconds": 5.0}, {"model_devices": 2, "devices": 2}],
    ids=lambda c: next(iter(c)),
)
def test_what_it_does_not_know_is_refused(configure, tmp_path, change):
    with pytest.raises(UserError, match="batch_seconds"):
        loop.run(configure(**change), tmp_path)
