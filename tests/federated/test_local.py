"""Local parameters: the store against a plain dictionary, the simulation against plain loops."""

import collections
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.compression.partial import Subset, partial_training
from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated import local
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.local import LocalStore, make_layout
from fedasr.federated.simulation import Simulation
from fedasr.privacy.adaptive import AdaptiveClip
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler

SIZE, USERS = 3, 5
LAYOUT = make_layout(
    {"day": jax.ShapeDtypeStruct((SIZE,), jnp.float32), "rest": np.zeros(2)}, ("^day$",)
)
INIT = np.arange(SIZE, dtype=np.float32)


# ------------------------------------------------------------------------------------- the store


class Killed(Exception):
    """The process is gone: nothing more is written."""


def write_until(budget):
    """`local._write`, until so many bytes are written; numbers of 8 bytes are written whole."""
    left = [budget]

    def write(file, offset, values):
        data = values.tobytes()
        room = min(left[0], len(data))
        if values.dtype == np.int64:
            room -= room % 8
        file.seek(offset)
        file.write(data[:room])
        left[0] -= len(data)
        if left[0] < 0:
            raise Killed

    return write


rounds = st.lists(st.sets(st.integers(0, USERS - 1), max_size=3), min_size=1, max_size=14)


@given(
    cohorts=rounds,
    every=st.integers(1, 4),
    keep=st.integers(1, 2),
    kills=st.lists(st.integers(0, 400), max_size=3),
    again=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_killed_at_any_write_it_restores_every_kept_checkpoint(
    tmp_path_factory, cohorts, every, keep, kills, again
):
    """Users and rows of a round differ from attempt to attempt: an old attempt's would show."""
    folder = tmp_path_factory.mktemp("store")
    history = {0: {}}  # round -> the rows after it
    checkpoints = [0]
    attempt, done = 0, 0
    while done < len(cohorts):
        attempt += 1
        with LocalStore(folder, LAYOUT, USERS) as store, pytest.MonkeyPatch.context() as patch:
            for round in checkpoints[-1:] if again else checkpoints[::-1]:
                with LocalStore(folder, LAYOUT, USERS, read_only=True) as other:
                    other.restore(round)
                    check(other, history[round])
            if again and len(checkpoints) > 1:  # the user removes the last one
                checkpoints.pop()
            done = checkpoints[-1]
            store.restore(done)
            patch.setattr(local, "_write", write_until(kills.pop() if kills else 1 << 40))
            try:
                for round in range(done, len(cohorts)):
                    rows = dict(history[round])
                    for user in sorted(cohorts[(round + attempt) % len(cohorts)]):
                        rows[user] = np.float32([attempt, round, user])
                        store.write([user], rows[user][None])
                        check(store, history[round])  # nothing shows before the round's end
                    store.commit()
                    check(store, rows)
                    history[round + 1] = rows
                    done = round + 1
                    if done % every == 0 and done > checkpoints[-1]:
                        store.flush()
                        checkpoints = [*checkpoints, done][-keep:]
                        store.release(checkpoints[0])
            except Killed:
                again = False
    with LocalStore(folder, LAYOUT, USERS, read_only=True) as store:
        store.restore(len(cohorts))
        check(store, history[len(cohorts)])


def check(store, rows):
    assert store.known.tolist() == [user in rows for user in range(USERS)]
    expected = [rows.get(user, INIT) for user in range(USERS)]
    np.testing.assert_array_equal(store.gather(range(USERS), INIT), expected)


def test_slots_that_no_checkpoint_needs_are_used_again(tmp_path):
    store = LocalStore(tmp_path, LAYOUT, USERS)
    for round in range(1, 40):
        store.write([0, 1, 2], np.full((3, SIZE), round, np.float32))
        store.commit()
        store.release(round - 2)
    slots = (tmp_path / local.ROWS_FILE).stat().st_size / (4 * SIZE)
    assert slots <= 3 * 4  # three versions, and the round that is being written
    with LocalStore(tmp_path, LAYOUT, USERS, read_only=True) as past:
        past.restore(37)
        assert past.gather([1], INIT).tolist() == [[37] * SIZE]


def test_prototypes(tmp_path):
    stores = {name: LocalStore(tmp_path / name, LAYOUT, USERS, name) for name in local.PROTOTYPES}
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, SIZE)).astype(np.float32)
    for store in stores.values():
        np.testing.assert_array_equal(store.gather([0, 4, -1], INIT), [INIT] * 3)
        store.write([3, 1], rows)
        np.testing.assert_array_equal(store.gather([4], INIT), [INIT])  # the round is not over
        store.commit()
        np.testing.assert_array_equal(store.gather([1, 3], INIT), rows[::-1])
    mean = rows.astype(np.float64).mean(0).astype(np.float32)
    expected = {  # of users 0, 2, 4 and one outside of the corpus
        "init": [INIT] * 4,
        "mean": [mean] * 4,
        "last": [INIT, rows[1], rows[0], rows[0]],
    }
    for name, store in stores.items():
        np.testing.assert_array_equal(store.gather([0, 2, 4, -1], INIT), expected[name])
        with LocalStore(tmp_path / name, LAYOUT, USERS, name) as again:
            again.restore(1)
            np.testing.assert_array_equal(again.gather([0, 2, 4, -1], INIT), expected[name])


def test_an_unfinished_round_is_forgotten(tmp_path):
    store = LocalStore(tmp_path, LAYOUT, USERS)
    store.write([0, 1], np.ones((2, SIZE)))
    store.discard()
    store.write([2], np.full((1, SIZE), 7))
    store.commit()
    check(store, {2: np.full(SIZE, 7)})
    assert store.summary() == {
        "parameters": SIZE,
        "users": 1,
        "bytes": 4 * SIZE,
        "prototype": "init",
    }


def test_files_of_something_else_are_refused(tmp_path):
    LocalStore(tmp_path, LAYOUT, USERS).write([1], np.ones((1, SIZE)))
    with pytest.raises(UserError, match="another model or population"):
        LocalStore(tmp_path, LAYOUT, USERS + 1)
    with pytest.raises(UserError, match="cannot open"):
        LocalStore(tmp_path / "nowhere", LAYOUT, USERS, read_only=True)
    with pytest.raises(UserError, match="prototype"):
        LocalStore(tmp_path, LAYOUT, USERS, "median")
    (tmp_path / local.ROWS_FILE).write_bytes(b"")
    store = LocalStore(tmp_path, LAYOUT, USERS, read_only=True)
    store.restore(1)
    with pytest.raises(UserError, match="shorter"):
        store.gather([1], INIT)


CHILD = """
import sys
from pathlib import Path
import numpy as np
from fedasr.federated.local import LocalStore, make_layout
folder, done = Path(sys.argv[1]), int(sys.argv[2])
layout = make_layout({"day": np.zeros(5000), "rest": np.zeros(2)}, ("^day$",))
store = LocalStore(folder, layout, 20)
store.restore(done)
for round in range(done + 1, 10**9):
    rng = np.random.default_rng(round)
    users = rng.choice(20, 6, replace=False)
    for user in users:
        store.write([user], np.full((1, 5000), 1000 * round + user))
    store.commit()
    if round % 3 == 0:
        store.flush()
        (folder / "done.tmp").write_text(str(round))
        (folder / "done.tmp").replace(folder / "done")
        store.release(round - 3)
"""


def test_kill_9_loses_nothing(tmp_path):
    layout = make_layout({"day": np.zeros(5000), "rest": np.zeros(2)}, ("^day$",))
    done, rng = 0, np.random.default_rng(0)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(done)])
        before = done
        while done < before + 6:
            assert child.poll() is None
            time.sleep(0.01)
            if (tmp_path / "done").exists():
                done = int((tmp_path / "done").read_text())
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.wait()
        done = int((tmp_path / "done").read_text())
        last = {}
        for round in range(1, done + 1):
            users = np.random.default_rng(round).choice(20, 6, replace=False)
            last |= {int(user): 1000 * round + int(user) for user in users}
        with LocalStore(tmp_path, layout, 20, read_only=True) as store:
            store.restore(done)
            assert np.flatnonzero(store.known).tolist() == sorted(last)
            rows = store.gather(sorted(last), np.zeros(5000, np.float32))
        np.testing.assert_array_equal(rows, [[last[user]] * 5000 for user in sorted(last)])


# ------------------------------------------------------------------------------ the layout of rows


def test_rows_hold_the_local_variables_and_nothing_else():
    params = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": {"x": jnp.bfloat16(7), "y": np.float32([8, 9])},
        "c": np.float32([1]),
    }
    layout = make_layout(params, ("^a", "b/x"))
    assert layout.local == (True, True, False, False)
    assert layout.shared == [False, False, True, True]
    row = layout.extract(params)
    assert row.tolist() == [0, 1, 2, 3, 4, 5, 7]
    new = layout.insert(params, -2 * row)
    assert new["a"].tolist() == [[0, -2, -4], [-6, -8, -10]]
    assert (new["b"]["x"].dtype, float(new["b"]["x"])) == (jnp.bfloat16, -14)
    assert new["b"]["y"] is params["b"]["y"]
    assert new["c"] is params["c"]


@pytest.mark.parametrize(
    ("patterns", "trained", "message"),
    [
        (("day", "nothing"), None, "matches none"),
        (("(",), None, "local.patterns"),
        ((), None, "no variable"),
        ((".",), None, "left to share"),
        (("day",), (False, True), "must train"),
        (("day",), (True, False), "left to share"),
    ],
)
def test_patterns_that_make_no_sense(patterns, trained, message):
    with pytest.raises(UserError, match=message):
        make_layout({"day": np.zeros(3), "rest": np.zeros(2)}, patterns, trained)


# ---------------------------------------------------------------------------------- the simulation

SIZES = [1, 4, 2, 3, 5, 2]
PARAMS = {
    "b": np.float32([0.25]),
    "day": {"scale": np.float32([1.0, 1.0]), "shift": np.float32([0.0, 0.0])},
    "w": np.float32([[0.5], [-1.0]]),
}
ONE = jax.devices()[:1]


def squares(params, batch, key):
    del key
    x = batch["x"] * params["day"]["scale"] + params["day"]["shift"]
    error = (x @ params["w"] + params["b"] - batch["y"])[..., 0]
    count = jnp.maximum(jnp.sum(batch["mask"]), 1)
    return 0.5 * jnp.sum(jnp.where(batch["mask"], error**2, 0.0)) / count, {}


def make_corpus():
    rng = np.random.default_rng(0)
    return InMemoryCorpus(
        {
            f"user{i}": [
                {k: rng.normal(size=n).astype(np.float32) for k, n in (("x", 2), ("y", 1))}
                for _ in range(size)
            ]
            for i, size in enumerate(SIZES)
        }
    )


CORPUS = make_corpus()


def simulation(
    folder, prototype="init", mechanism=None, trained=None, client=None, hardware=Hardware(ONE)
):
    layout = make_layout(PARAMS, ("^day/",), trained)
    return Simulation(
        CORPUS,
        mechanism or Mechanism(float("inf"), "uniform", 0.0, sampler(3)),
        FedAvg(
            client or local_training(squares, optax.sgd(0.2), grad_clip=None),
            optax.sgd(1.0),
            trained=trained,
            store=LocalStore(folder, layout, len(SIZES), prototype),
        ),
        Batching(2, epochs=2),
        hardware=hardware,
        seed=3,
    )


def sampler(cohort):
    return FixedSizeSampler(len(SIZES), cohort, seed=7)


def by_hand(rounds, prototype, draws, bound=np.inf, trained=("b", "w")):
    """Federated averaging with local variables, a plain loop in float64."""
    start = np.r_[1.0, 1.0, 0.0, 0.0]
    theta = {"b": PARAMS["b"].astype(float), "w": PARAMS["w"].astype(float)}
    rows = {}
    for round in range(rounds):
        sums, new = {k: 0.0 for k in trained}, dict(rows)
        for user in map(int, draws.sampler.cohort(round)):
            before = [other for other in rows if other < user]
            fresh = start
            if prototype == "mean" and rows:
                fresh = np.mean(list(rows.values()), 0)
            elif prototype == "last" and before:
                fresh = rows[max(before)]
            own = {k: v.copy() for k, v in theta.items()}
            row = rows.get(user, fresh).copy()
            for indices in Batching(2, epochs=2).plan(SIZES[user], draws.order, round, user):
                batch = CORPUS.get(user, indices.tolist())
                x, y = (np.stack([e[k] for e in batch]).astype(float) for k in ("x", "y"))
                z = x * row[:2] + row[2:]
                error = (z @ own["w"] + own["b"] - y) / len(x)
                back = error @ own["w"].T
                row = row - 0.2 * np.r_[(back * x).sum(0), back.sum(0)]
                if "w" in trained:
                    own["w"] = own["w"] - 0.2 * z.T @ error
                own["b"] = own["b"] - 0.2 * error.sum(0)
            for k in trained:
                delta = theta[k] - own[k]
                sums[k] = sums[k] + delta * min(1.0, bound / np.linalg.norm(delta))
            new[user] = row
        rows = new
        theta |= {k: theta[k] - sums[k] / 3 for k in trained}
    return theta, rows


@pytest.mark.parametrize(
    ("chunk", "devices", "prototype"), [(1, 1, "init"), (1, 2, "mean"), (0, 2, "last")]
)
def test_rounds_equal_a_plain_loop(tmp_path, chunk, devices, prototype):
    """A user is in many rounds: one that were read before it is written would show."""
    sim = simulation(tmp_path, prototype, hardware=Hardware(jax.devices()[:devices], chunk=chunk))
    start = sim.init(PARAMS)
    draws = sim.draws(start)
    *_, (state, _) = sim.run(start, 5)
    theta, rows = by_hand(5, prototype, draws)
    turns = collections.Counter(int(u) for r in range(5) for u in draws.sampler.cohort(r))
    assert max(turns.values()) >= 3
    for name, value in theta.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.params["day"], PARAMS["day"])
    assert np.flatnonzero(sim.store.known).tolist() == sorted(rows)
    got = sim.store.gather(sorted(rows), np.zeros(4, np.float32))
    np.testing.assert_allclose(got, [rows[user] for user in sorted(rows)], rtol=1e-5, atol=1e-6)


def test_only_shared_variables_are_clipped_noised_and_optimised(tmp_path):
    """By layer, with adaptive bounds of a factor of 1, and "w" trained by nobody."""
    trained = [True, True, True, False]  # b, scale, shift, w
    mechanism = Mechanism(0.1, "uniform", 0.0, sampler(3), adaptive=AdaptiveClip(0.0, 0.5, 1e-9))
    fixed = Subset("fixed", ("^b", "^day"))
    client = partial_training(
        lambda loss: local_training(loss, optax.sgd(0.2), grad_clip=None), squares, fixed
    )
    sim = simulation(tmp_path, mechanism=mechanism, trained=trained, client=client)
    state = sim.init(PARAMS)
    draws = sim.draws(state)
    assert sim.layer_names(PARAMS) == ["b"]
    optimised = [x.shape for x in jax.tree.leaves(state.opt_state)]
    assert (2,) not in optimised and (2, 1) not in optimised
    *_, (state, metrics) = sim.run(state, 4)
    theta, rows = by_hand(4, "init", draws, 0.1, ("b",))
    assert len(metrics.norms) == len(metrics.clipped) == 1
    np.testing.assert_allclose(state.params["b"], theta["b"], rtol=1e-5)
    np.testing.assert_array_equal(state.params["w"], PARAMS["w"])
    got = sim.store.gather(sorted(rows), np.zeros(4, np.float32))
    np.testing.assert_allclose(got, [rows[user] for user in sorted(rows)], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    mechanism = Mechanism(0.5, "uniform", 0.2, sampler(3))
    whole = simulation(tmp_path / "whole", mechanism=mechanism)
    states = [jax.device_get(state) for state, _ in whole.run(whole.init(PARAMS), 6)]
    first = simulation(tmp_path / "parts", mechanism=mechanism)
    for state, _ in first.run(first.init(PARAMS), 6):
        if int(state.round) == 5:  # as of a checkpoint after round 3, two rounds are lost
            break
    again = simulation(tmp_path / "parts", mechanism=mechanism)
    with pytest.raises(UserError, match="restore"):
        next(again.run(again.transfer(states[2]), 3))
    again.store.restore(3)
    *_, (state, _) = again.run(again.transfer(states[2]), 3)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[-1])
    rows = [sim.store.gather(range(6), np.zeros(4, np.float32)) for sim in (whole, again)]
    np.testing.assert_array_equal(*rows)
    np.testing.assert_array_equal(whole.store.known, again.store.known)


def test_clients_that_are_not_valid_keep_what_they_had(tmp_path):
    def update(params, batches, num_steps, key, max_steps=None, round=0):
        delta, metrics = local_training(squares, optax.sgd(0.2))(
            params, batches, num_steps, key, max_steps, round
        )
        size = num_steps  # of users 0 to 5: 2, 4, 2, 4, 6, 2
        bad = jnp.where(size == 4, jnp.nan, 0.0)
        delta["w"] = delta["w"] + bad
        delta["day"]["shift"] = delta["day"]["shift"] + jnp.where(size == 6, jnp.inf, 0.0)
        return delta, metrics

    everybody = FixedSizeSampler(len(SIZES), len(SIZES), seed=0)
    mechanism = Mechanism(float("inf"), "uniform", 0.0, everybody)
    sim = simulation(tmp_path, mechanism=mechanism, client=update, hardware=Hardware(ONE, chunk=0))
    ((state, metrics),) = sim.run(sim.init(PARAMS), 1)
    assert metrics.invalid == 2
    rows = sim.store.gather(range(6), np.zeros(4, np.float32))
    kept = [(row == [1, 1, 0, 0]).all() for row in rows]
    # User 4's shared update is fine and counts: the server knows nothing of the local ones.
    assert kept == [False, True, False, True, True, False]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_paths_from_user_to_user_are_refused_under_noise(tmp_path):
    """By the simulation itself, whoever makes it."""

    def noisy(sampler, noise=1.0):
        return Mechanism(1.0, "uniform", noise, sampler)

    for prototype in ("mean", "last"):
        with pytest.raises(UserError, match="each other's"):
            simulation(tmp_path / prototype, prototype, noisy(sampler(3)))
        simulation(tmp_path / prototype, prototype, noisy(sampler(3), 0.0))
    few = PoissonSampler(len(SIZES), 3, seed=0, slots=4)
    with pytest.raises(UserError, match="displaced"):
        simulation(tmp_path / "few", mechanism=noisy(few))
    simulation(tmp_path / "few", mechanism=noisy(few, 0.0))
    simulation(tmp_path / "all", mechanism=noisy(PoissonSampler(len(SIZES), 3, seed=0)))


def test_store_and_corpus_must_agree(tmp_path):
    few = LocalStore(tmp_path / "few", make_layout(PARAMS, ("^day/",)), 2)
    other = LocalStore(tmp_path / "other", make_layout(PARAMS, ("^day/",)), len(SIZES))
    for store, trained, message in (
        (few, None, "2 users"),
        (other, [True, True, True, False], "is trained"),
    ):
        with pytest.raises(UserError, match=message):
            Simulation(
                CORPUS,
                Mechanism(float("inf"), "uniform", 0.0, sampler(3)),
                FedAvg(
                    local_training(squares, optax.sgd(0.2)),
                    optax.sgd(1.0),
                    trained=trained,
                    store=store,
                ),
                Batching(2, epochs=2),
            )
