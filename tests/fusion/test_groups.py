"""Groups that train side by side and are fused: by hand, resumed, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.simulation import Simulation
from fedasr.fusion import groups, methods
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler
from fedasr.training.checkpoint import Checkpointer

TARGETS = np.float32([[1, -1, 0], [0, 2, 1]])
PARAMS = {"w": np.zeros(3, np.float32)}


def squares(params, batch, key):
    del key
    errors = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return jnp.sum(errors * batch["mask"]) / jnp.maximum(batch["mask"].sum(), 1), {}


def simulation(group):
    rng = np.random.default_rng(group)

    def example():
        x = rng.normal(size=3).astype(np.float32)
        return {"x": x, "y": np.float32(x @ TARGETS[group])}

    users = {f"u{i}": [example() for _ in range(4)] for i in range(4 + group)}
    return Simulation(
        InMemoryCorpus(users, []),
        Mechanism(0.5, "uniform", 0.05, FixedSizeSampler(4 + group, 3, seed=group)),
        FedAvg(local_training(squares, optax.sgd(0.1)), optax.adam(0.1)),
        Batching(2, steps=2),
        seed=group,
    )


@pytest.fixture(scope="module")
def simulations():
    return [simulation(group) for group in range(2)]


def starts(simulations):
    return [s.init(PARAMS) for s in simulations]


def test_rounds_of_each_group_then_one_model_for_all(simulations):
    found = list(groups.train(simulations, starts(simulations), 5, 2, groups.average))
    assert [fused.round for fused in found] == [2, 4, 5]
    assert [[m.round for m in group] for group in found[1].metrics] == [[3, 4]] * 2
    states = starts(simulations)
    for fused, rounds in zip(found, (2, 2, 1), strict=True):
        for i, one in enumerate(simulations):
            *_, (states[i], _) = one.run(states[i], rounds)
        mean = (np.asarray(states[0].params["w"]) + np.asarray(states[1].params["w"])) / 2
        np.testing.assert_allclose(fused.model["w"], mean, atol=1e-6)
        states = [
            one.transfer(state._replace(params=fused.model))
            for one, state in zip(simulations, states, strict=True)
        ]
        # Optimisers and noise counters are each group's own, and go on.
        jax.tree.map(np.testing.assert_array_equal, fused.states, states)
        moments = [state.opt_state[1][0].mu["w"] for state in fused.states]
        assert not np.array_equal(*moments)
    np.testing.assert_array_equal(found[-1].states[0].params["w"], found[-1].model["w"])


def score(params):
    return jnp.exp(-jnp.sum((jnp.asarray(TARGETS) - params["w"]) ** 2, axis=1) / 8)


METHOD = methods.evolve(score, methods.Evolution(population=4, mutation=0.0))


def test_interrupted_it_ends_the_same(simulations, tmp_path):
    fuse = groups.by_search(METHOD, 10, seed=3)
    *_, whole = groups.train(simulations, starts(simulations), 6, 2, fuse)
    first = next(groups.train(simulations, starts(simulations), 6, 2, fuse))
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(2, {"states": first.states}, {})
        like = jax.device_get({"states": starts(simulations)})
        states = checkpointer.restore(2, like)[0]["states"]
    states = [s.transfer(state) for s, state in zip(simulations, states, strict=True)]
    *_, resumed = groups.train(simulations, states, 6, 2, fuse)
    jax.tree.map(np.testing.assert_array_equal, resumed.model, whole.model)
    jax.tree.map(np.testing.assert_array_equal, resumed.states, whole.states)
    assert list(groups.train(simulations, resumed.states, 6, 2, fuse)) == []


def test_a_search_is_never_worse_than_a_parent_and_a_function_of_the_round():
    models = [{"w": target} for target in TARGETS]
    fuse = groups.by_search(METHOD, 60, seed=0)
    found = fuse(models, 7)
    best = max(float(score(model).mean()) for model in models)
    assert float(score(found).mean()) > best + 0.01
    np.testing.assert_array_equal(found["w"], fuse(models, 7)["w"])
    assert not np.array_equal(found["w"], fuse(models, 8)["w"])
    assert not np.array_equal(found["w"], groups.by_search(METHOD, 60, seed=1)(models, 7)["w"])


def test_mistakes(simulations):
    states = starts(simulations)
    with pytest.raises(UserError, match="2 groups"):
        next(groups.train(simulations, states[:1], 4, 2, groups.average))
    with pytest.raises(UserError, match="not 0"):
        next(groups.train(simulations, states, 4, 0, groups.average))
    *_, (ahead, _) = simulations[0].run(states[0], 1)
    with pytest.raises(UserError, match="0, 1"):
        next(groups.train(simulations, [ahead, states[1]], 4, 2, groups.average))


def test_groups_that_would_draw_the_same_noise_are_refused(simulations):
    twins = [simulations[0]] * 2
    with pytest.raises(UserError, match="different seeds"):
        next(groups.train(twins, starts(twins), 2, 1, groups.average))
