"""A client's model over several devices: the same result, and a part of it on each."""

import jax
import numpy as np
import optax
import pytest

from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.cohort import client_mesh, model_sharding
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.models.recogniser import ARRAYS, make_recogniser
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler
from fedasr.training.central import CentralTraining
from fedasr.training.evaluation import Evaluator

BUCKET = {"features": 24, "labels": 4}
RECOGNISER = make_recogniser("transformer", {"dim": 8, "mlp": 16, "blocks": 1, "heads": 2})


def examples(seed, count):
    rng = np.random.default_rng(seed)
    return [
        {
            "features": rng.standard_normal((int(rng.integers(15, 25)), 80), np.float32),
            "labels": rng.integers(1, 29, 3).astype(np.int32),
        }
        for _ in range(count)
    ]


CORPUS = InMemoryCorpus({f"u{i}": examples(i, 1 + i) for i in range(4)}, ragged=ARRAYS)


def simulation(devices, model_devices, chunk=1):
    return Simulation(
        CORPUS,
        Mechanism(0.1, "uniform", 0.5, FixedSizeSampler(4, 4, seed=0)),
        FedAvg(local_training(RECOGNISER.loss, optax.sgd(0.1)), optax.lamb(1e-2)),
        Batching(2, epochs=1, buckets=[BUCKET]),
        hardware=Hardware(jax.devices()[:devices], model_devices, chunk),
    )


def after_rounds(sim, rounds=3):
    state = sim.init(RECOGNISER.init(jax.random.key(0)))
    for state, metrics in sim.run(state, rounds):  # noqa: B007
        pass
    return state, metrics


def shares(tree):
    """The largest part of each array that one device holds, as a share of the array."""
    return [
        max(shard.data.size for shard in x.addressable_shards) / x.size
        for x in jax.tree.leaves(tree)
    ]


@pytest.mark.long
@pytest.mark.parametrize("chunk", [1, 2])
def test_the_result_is_that_of_one_device(chunk):
    """Noise and LAMB included; nothing is compiled again after the first round."""
    alone, said = after_rounds(simulation(1, 1, chunk))
    together = simulation(2, 2, chunk)
    state, metrics = after_rounds(together)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone.params, state.params
    )
    assert metrics.loss == pytest.approx(said.loss, rel=1e-5)
    assert metrics.steps == said.steps
    compiled = together.compilations()
    for _ in together.run(state, 2):
        pass
    assert together.compilations() == compiled

    # Matrices and their moments lie half on each device; nothing else is split.
    for name, tree in (("params", state.params), ("moments", state.opt_state)):
        matrices = [x for x in jax.tree.leaves(tree) if x.ndim > 1]
        assert matrices, name
        assert set(shares(matrices)) == {0.5}
        assert set(shares([x for x in jax.tree.leaves(tree) if x.ndim < 2 and x.size])) <= {1.0}
    assert set(shares(alone.params)) == {1.0}


@pytest.mark.slow
def test_a_device_needs_less_memory():
    params = jax.eval_shape(RECOGNISER.init, jax.random.key(0))
    assert simulation(2, 2).chunk_bytes(params) < simulation(1, 1).chunk_bytes(params)


@pytest.mark.slow
def test_central_training_and_evaluation_split_the_model_too():
    found = []
    for model_devices in (1, 2):
        training = CentralTraining(
            CORPUS,
            RECOGNISER.loss,
            optax.adamw(1e-2),
            4,
            seed=0,
            buckets=[BUCKET],
            devices=jax.devices()[:model_devices],
            select=ARRAYS,
            model_devices=model_devices,
        )
        state = training.init(RECOGNISER.init(jax.random.key(0)))
        for state, _, loss in training.run(state, 3):  # noqa: B007
            pass
        evaluator = Evaluator(
            RECOGNISER,
            [BUCKET],
            4,
            jax.devices()[:model_devices],
            model_devices=model_devices,
        )
        found.append((loss, evaluator(state.params, CORPUS)["loss"]))
        matrices = [x for x in jax.tree.leaves(state.params) if x.ndim > 1]
        assert set(shares(matrices)) == {1 / model_devices}
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_arrays_are_split_along_their_longest_axis_that_divides():
    mesh = client_mesh(jax.devices()[:2], 2)
    tree = {
        "long": np.zeros((3, 4, 10)),
        "odd": np.zeros((3, 5)),
        "even": np.zeros((4, 7)),
        "vector": np.zeros(8),
    }
    specs = jax.tree.map(lambda s: tuple(s.spec), model_sharding(mesh, tree))
    assert specs["long"] == (None, None, "model")
    assert specs["odd"] == (None, None)
    assert specs["even"] == ("model", None)
    assert specs["vector"] == (None,)
    by_device = model_sharding(mesh, {"a": np.zeros((1, 4, 7))}, by_device=True)
    assert tuple(by_device["a"].spec) == ("clients", "model", None)


@pytest.mark.parametrize("model_devices", [0, -1, 3])
def test_devices_that_cannot_be_grouped(model_devices):
    with pytest.raises(UserError, match="model_devices"):
        client_mesh(jax.devices()[:2], model_devices)
