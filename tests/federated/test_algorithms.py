"""A federated algorithm is one file and one line: two of them, written here as users would."""

import dataclasses
import inspect
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedasr as fa
from fedasr.federated import checks
from fedasr.federated.algorithms import (
    ALGORITHMS,
    Facts,
    algorithm_by_name,
    make_algorithm,
    memory_layout,
)
from fedasr.training.builders.simulations import make_simulation
from fedasr.training.config import Config, check_fields, default_config

ONE = jax.devices()[:1]
USERS, COHORT, STEPS, RATE = 5, 2, 3, 0.2
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(USERS, 2, 3)).astype(np.float32)
CORPUS = fa.InMemoryCorpus({f"u{i}": [{"x": x} for x in points] for i, points in enumerate(POINTS)})
SCALES = np.float32([1.0, 2.0, 0.5])


def squares(params, batch, key):
    error = (params["w"] - batch["x"]) ** 2 * SCALES
    return 0.5 * jnp.mean(jnp.sum(error, axis=1)), {}


@dataclasses.dataclass(frozen=True)
class Scaffold:
    """SCAFFOLD (arXiv 1910.06378, option II) of parameters {"model", "control", "own"}.

    control: the server's variate, sent and noised like the model. own: the client's, in a store.
    """

    loss: Any
    rate: float
    share: float  # of the users who take part
    store: fa.LocalStore
    trained = weights = weigh = None

    @staticmethod
    def variables(model):
        zeros = jax.tree.map(np.zeros_like, model)
        return {"model": model, "control": zeros, "own": zeros}

    @property
    def server_optimizer(self):
        steps = {"model": optax.sgd(1.0), "control": optax.sgd(self.share)}
        return optax.multi_transform(
            steps, {"model": "model", "control": "control", "own": "model"}
        )

    @property
    def client_update(self):
        gradient = fa.batch_gradient(self.loss)

        def update(params, batches, num_steps, key, max_steps=None, round=0):
            start, control, own = params["model"], params["control"], params["own"]

            def step(i, model):
                _, grads = gradient(model, batches, i, jax.random.fold_in(key, i))
                return jax.tree.map(
                    lambda y, g, c, c_i: y - self.rate * (g - c_i + c), model, grads, control, own
                )

            end = jax.lax.fori_loop(0, num_steps, step, start)
            moved = jax.tree.map(jnp.subtract, start, end)
            length = self.rate * jnp.maximum(num_steps, 1)
            less = jax.tree.map(lambda c, d: c - d / length, control, moved)  # own, old minus new
            metrics = fa.ClientMetrics(jnp.float32(0), {})
            return {"model": moved, "control": less, "own": less}, metrics

        return update


def scaffold_by_hand(cohorts):
    model, control, own = np.zeros(3), np.zeros(3), np.zeros((USERS, 3))
    for cohort in cohorts:
        ends, changes = [], []
        for user in cohort:
            y = model.copy()
            for _ in range(STEPS):
                y -= RATE * (SCALES * (y - POINTS[user].mean(0)) - own[user] + control)
            new = own[user] - control + (model - y) / (STEPS * RATE)
            ends.append(y - model)
            changes.append(new - own[user])
            own[user] = new
        model = model + np.mean(ends, axis=0)
        control = control + len(cohort) / USERS * np.mean(changes, axis=0)
    return model, control, own


def test_an_algorithm_with_state_on_both_sides(tmp_path):
    variables = Scaffold.variables({"w": np.zeros(3, np.float32)})
    layout = fa.make_layout(variables, ("^own/",))
    with fa.LocalStore(tmp_path, layout, USERS) as store:
        algorithm = Scaffold(squares, RATE, COHORT / USERS, store)
        assert isinstance(algorithm, fa.Algorithm)
        sim = fa.Simulation(
            CORPUS,
            fa.Mechanism(np.inf, "uniform", 0.0, fa.FixedSizeSampler(USERS, COHORT, seed=0)),
            algorithm,
            fa.Batching(2, steps=STEPS),
            hardware=fa.Hardware(ONE),
        )
        start = sim.init(variables)
        sampler = sim.draws(start).sampler
        *_, (state, metrics) = sim.run(start, 4)
        own = store.gather(range(USERS), np.zeros(3, np.float32))
    assert (metrics.clients, metrics.invalid) == (COHORT, 0)
    model, control, expected = scaffold_by_hand([sampler.cohort(r) for r in range(4)])
    assert np.abs(control).min() > 0 and (np.abs(expected).sum(1) > 0).sum() > COHORT
    np.testing.assert_allclose(state.params["model"]["w"], model, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params["control"]["w"], control, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state.params["own"]["w"], 0)  # the server's stays


SIGN = '''
import jax, jax.numpy as jnp, optax
from fedasr.federated.algorithms.fedavg import FedAvg


def ServerSign(client_update, server_optimizer, *, trained=None, store=None):
    """The server steps by the signs of the mean."""
    sign = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
    server_optimizer = optax.chain(sign, server_optimizer)
    return FedAvg(client_update, server_optimizer, trained=trained, store=store)
'''


def test_a_file_and_a_line_are_a_setting(tmp_path, monkeypatch):
    config = default_config()
    config.algorithm = "sign"
    config.update(cohort=COHORT, chunk=1)
    config.privacy.enabled = False
    config.server.update(optimizer="sgd", learning_rate=0.125, options={})
    config.client.update(steps=1, batch_size=2)
    with pytest.raises(fa.UserError, match="algorithm='sign' is unknown: choose one of 'central'"):
        check_fields(config.to_dict())
    (tmp_path / "serversign.py").write_text(SIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ALGORITHMS, "sign", "serversign:ServerSign")
    check_fields(config.to_dict())
    examples = {
        f"u{i}": [{"features": points, "labels": np.ones(2, np.int32)}]
        for i, points in enumerate(POINTS)
    }
    data: Any = types.SimpleNamespace(
        train=fa.InMemoryCorpus(examples), grid=fa.Grid(), resident=lambda sharding: None
    )

    def loss(params, batch, key):
        return jnp.sum(params["w"] * batch["features"].mean((0, 1))), {}

    sim = make_simulation(Config.of(config.to_dict()), data, loss, ONE)
    ((state, metrics),) = sim.run(sim.init({"w": np.zeros(3, np.float32)}), 1)
    assert metrics.clients > 0
    np.testing.assert_array_equal(np.abs(state.params["w"]), 0.125)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_those_that_there_are(name):
    model = {"v": np.zeros(1, np.float32), "w": np.zeros(3, np.float32)}
    layout = memory_layout(name, model)
    if name == "fedrep":
        layout = fa.make_layout(model, ("^v$",))
    store = None if layout is None else types.SimpleNamespace(layout=layout)
    update, facts = fa.local_training(squares, optax.sgd(1.0)), Facts(share=0.5, unit=1.0)
    algorithm = make_algorithm(name, update, optax.sgd(1.0), facts, {}, store=store)
    assert isinstance(algorithm, fa.Algorithm)
    with pytest.raises(fa.UserError, match=f"unknown algorithm 'fedsgd': choose one of.*{name}"):
        algorithm_by_name("fedsgd")


def test_a_simulation_takes_groups():
    parameters = inspect.signature(fa.Simulation).parameters
    assert [*parameters] == [
        "corpus", "mechanism", "algorithm", "batching", "hardware", "seed", "identity",
    ]  # fmt: skip


UPDATE = fa.local_training(squares, optax.sgd(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fa.Batching(2), "exactly one of the client's steps and epochs"),
        (lambda: fa.Batching(steps=1), "batch size and batch frames"),
        (lambda: fa.Batching(2, steps=1, micro_batch=-1), "micro_batch must be at least 0"),
        (lambda: fa.Hardware(chunk=-1), "chunk must be at least 1"),
        (lambda: fa.Hardware(model_devices=0), "model_devices must be at least 1"),
        (lambda: fa.Hardware(ONE, model_devices=2), "1 devices cannot be grouped"),
    ],
)
def test_groups_check_themselves(make, message):
    with pytest.raises(fa.UserError, match=message):
        make()


def test_weights_beside_numbers_of_examples_are_refused():
    """They would be used for nothing."""
    sampler = fa.FixedSizeSampler(USERS, COHORT, seed=0)
    mechanism = fa.Mechanism(np.inf, "global", 0.0, sampler, weighting="examples")
    algorithm = fa.FedAvg(UPDATE, optax.sgd(1.0), weights=np.ones(USERS))
    with pytest.raises(fa.UserError, match="this one counts examples"):
        fa.Simulation(CORPUS, mechanism, algorithm, fa.Batching(1, steps=1))


def test_weigh_needs_the_whole_model(tmp_path):
    variables = Scaffold.variables({"w": np.zeros(3, np.float32)})
    with fa.LocalStore(tmp_path, fa.make_layout(variables, ("^own/",)), USERS) as store:
        with pytest.raises(fa.UserError, match="without the user's local parameters"):
            fa.FedAvg(UPDATE, optax.sgd(1.0), store=store, weigh=lambda *_: jnp.float32(1))


def test_what_needs_one_process_or_one_device_is_refused(monkeypatch):
    """Rules whose breach no single process can reach by a simulation, asked by themselves."""
    resident, store = (
        types.SimpleNamespace(resident=object()),
        types.SimpleNamespace(store=types.SimpleNamespace(read_only=False)),
    )
    two, one = types.SimpleNamespace(model_devices=2), types.SimpleNamespace(model_devices=1)
    shares, none = types.SimpleNamespace(secure=object()), types.SimpleNamespace(secure=None)
    checks.resident_is_in_one_process(resident)
    checks.store_has_one_writer(store)
    checks.shares_are_whole(shares, one)
    checks.shares_are_whole(none, two)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(fa.UserError, match="one process"):
        checks.resident_is_in_one_process(resident)
    checks.store_has_one_writer(store)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(fa.UserError, match="read_only=True in the others"):
        checks.store_has_one_writer(store)
    store.store.read_only = True
    checks.store_has_one_writer(store)
    with pytest.raises(fa.UserError, match="model_devices=1"):
        checks.shares_are_whole(shares, two)


def test_rules_hold_for_algorithms_that_do_not_check_themselves(tmp_path):
    variables = Scaffold.variables({"w": np.zeros(3, np.float32)})
    sampler = fa.FixedSizeSampler(USERS, COHORT, seed=0)
    mechanism = fa.Mechanism(1.0, "global", 0.0, sampler, weighting="bounded")
    with fa.LocalStore(tmp_path, fa.make_layout(variables, ("^own/",)), USERS) as store:
        sound = {"trained": None, "store": store, "weights": None, "weigh": None}
        broken = {
            "without the user's local parameters": {"weigh": lambda *_: jnp.float32(1)},
            "what is trained": {"trained": [True] * len(jax.tree.leaves(variables))},
        }
        for message, change in broken.items():
            algorithm = types.SimpleNamespace(
                client_update=UPDATE, server_optimizer=optax.sgd(1.0), **sound | change
            )
            with pytest.raises(fa.UserError, match=message):
                fa.Simulation(CORPUS, mechanism, algorithm, fa.Batching(1, steps=1))
