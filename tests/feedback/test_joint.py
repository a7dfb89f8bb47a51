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
from fedasr.federated.hardware import Hardware
from fedasr.federated.server import ServerState
from fedasr.federated.simulation import Simulation
from fedasr.feedback.joint import JointTraining, average_checkpoints, average_params
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler
from fedasr.training.central import CentralTraining
from fedasr.training.checkpoint import Checkpointer

ONE = jax.devices()[:1]
PARAMS = {"w": np.zeros(3, np.float32)}


def corpus(target, users, seed):
    rng = np.random.default_rng(seed)

    def example():
        x = rng.normal(size=3).astype(np.float32)
        return {"x": x, "y": np.float32(x @ target)}

    return InMemoryCorpus({f"u{i}": [example() for _ in range(4)] for i in range(users)}, [])


def squares(params, batch, key):
    del key
    errors = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return jnp.sum(errors * batch["mask"]) / jnp.maximum(batch["mask"].sum(), 1), {}


OURS, THEIRS = np.float32([1, -1, 0]), np.float32([0, 2, 1])


@pytest.fixture(scope="module")
def parts():
    simulation = Simulation(
        corpus(THEIRS, 6, 1),
        Mechanism(0.5, "uniform", 0.1, FixedSizeSampler(6, 3, seed=0)),
        FedAvg(local_training(squares, optax.sgd(0.1)), optax.adam(0.05)),
        Batching(2, steps=2),
        hardware=Hardware(ONE),
    )
    central = CentralTraining(
        corpus(OURS, 5, 2), squares, optax.adam(0.02), 4, seed=3, buckets=(), devices=ONE
    )
    return simulation, central


def test_a_round_is_a_federated_round_and_then_central_steps(parts):
    simulation, central = parts
    joint = JointTraining(simulation, central, steps=3)
    state = joint.init(PARAMS)
    server, middle = simulation.init(PARAMS), central.init(PARAMS)
    for round in range(1, 4):
        ((state, metrics),) = joint.run(state, 1)
        ((server, expected),) = simulation.run(server, 1)
        middle = ServerState(server.params, middle.opt_state, middle.round)
        for middle, _, _ in central.run(middle, 3):  # noqa: B007
            pass
        server = ServerState(middle.params, server.opt_state, server.round, server.root)
        np.testing.assert_array_equal(state.params["w"], middle.params["w"])
        assert (int(state.round), int(state.step)) == (round, 3 * round)
        assert (metrics.round, metrics.loss) == (round, expected.loss)


def test_a_restored_state_goes_on_bit_for_bit(parts, tmp_path):
    joint = JointTraining(*parts, steps=2)
    *_, (whole, _) = joint.run(joint.init(PARAMS), 5)
    *_, (half, _) = joint.run(joint.init(PARAMS), 2)
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(2, half, {})
        restored, _ = checkpointer.restore(2, jax.device_get(joint.init(PARAMS)))
    *_, (resumed, _) = joint.run(joint.transfer(restored), 3)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))


def test_central_steps_hold_on_to_what_the_server_knows(parts):
    simulation, _ = parts
    joint = JointTraining(*parts, steps=3)
    *_, (alone, _) = simulation.run(simulation.init({"w": OURS}), 40)
    *_, (mixed, _) = joint.run(joint.init({"w": OURS}), 40)
    drift = [np.linalg.norm(np.asarray(s.params["w"]) - OURS) for s in (alone, mixed)]
    assert drift[1] < 0.7 * drift[0]


def test_joint_mistakes(parts):
    with pytest.raises(UserError, match="central step"):
        JointTraining(*parts, steps=0)


def test_averages():
    trees = [{"a": np.float32([1, 5]), "b": jnp.bfloat16(x)} for x in (2, 4)]
    trees[1]["a"] = np.float32([3, 5])
    mean = average_params(trees)
    np.testing.assert_array_equal(mean["a"], [2, 5])
    assert mean["a"].dtype == np.float32 and mean["b"].dtype == jnp.bfloat16 and mean["b"] == 3
    np.testing.assert_array_equal(average_params(trees, [3, 1])["a"], [1.5, 5])
    np.testing.assert_array_equal(average_params(trees[:1])["a"], trees[0]["a"])
    # In float32 the small ones would be lost one by one.
    many = [np.float32([1e8])] + [np.float32([1])] * 64
    assert average_params(many)[0] == np.float32((1e8 + 64) / 65)
    for bad in (([], None), (trees, [1]), (trees, [1, -1]), (trees, [0, 0])):
        with pytest.raises(UserError):
            average_params(*bad)


def test_averages_of_checkpoints(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", 3) as checkpointer:
        for step, value in ((9, 1.0), (10, 2.0), (11, 6.0)):
            params = {"w": jnp.full(2, value)}
            checkpointer.save(step, ServerState(params, (), jnp.int32(step)), {})
    np.testing.assert_array_equal(average_checkpoints(tmp_path, 2)["w"], [4, 4])
    np.testing.assert_array_equal(average_checkpoints(tmp_path / "checkpoints", 3)["w"], [3, 3])
    for path, last in ((tmp_path, 4), (tmp_path, 0), (tmp_path / "nowhere", 1)):
        with pytest.raises(UserError, match="cannot be averaged"):
            average_checkpoints(path, last)
