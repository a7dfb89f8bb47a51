"""Runs of many seeds: nothing depends on neighbours, measurements, devices or interruptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.fusion import baselines, methods
from fedasr.fusion.run import run
from fedasr.training.checkpoint import lock_directory

TASK = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)


def score(params):
    return jax.nn.sigmoid(jnp.sum(TASK * params, 1))


def parents(key):
    return jax.random.normal(key, (2, 6))


METHOD = methods.evolve(score, methods.Evolution(population=4, mutation=0.2))
measure = {"measure": lambda params: {"first": params[0]}}


@pytest.fixture(scope="module")
def whole():
    return run(METHOD, parents, [0, 1, 2], 40, every=10, **measure)


def test_result(whole):
    assert whole.best.shape == (3, 6) and whole.evaluations == 40 and whole.timed == 120
    np.testing.assert_array_equal(whole.curve["evaluations"], [0, 10, 20, 30, 40])
    assert whole.curve["score"].shape == (5, 3)
    np.testing.assert_allclose(
        whole.curve["score"][-1], [float(score(b).mean()) for b in whole.best], atol=1e-6
    )
    np.testing.assert_allclose(whole.curve["first"][-1], whole.best[:, 0], atol=1e-6)
    assert whole.curve["score"][-1].mean() > whole.curve["score"][0].mean()
    assert len({tuple(b) for b in whole.best.tolist()}) == 3
    assert (whole.curve["coverage"] >= whole.curve["score"]).all()


def test_neighbours_measurements_and_devices_change_nothing(whole):
    alone = run(METHOD, parents, [2], 40, every=33, devices=jax.devices()[:1], **measure)
    # Up to rounding: another number of seeds on a device is another program.
    np.testing.assert_allclose(alone.best[0], whole.best[2], atol=1e-5)
    np.testing.assert_array_equal(alone.curve["evaluations"], [0, 33, 40])
    np.testing.assert_allclose(alone.curve["score"][-1], whole.curve["score"][-1, 2:], atol=1e-5)


def test_resumed(whole, tmp_path):
    settings = {"every": 10, "workdir": tmp_path, "identity": {"a": 1}, **measure}
    part = run(METHOD, parents, [0, 1, 2], 20, **settings)
    assert part.evaluations == 20
    lines = []
    rest = run(METHOD, parents, [0, 1, 2], 40, log=lines.append, **settings)
    np.testing.assert_array_equal(rest.best, whole.best)
    jax.tree.map(np.testing.assert_array_equal, dict(rest.curve), dict(whole.curve))
    assert lines[0] == "going on from 20 evaluations" and rest.timed == 60
    again = run(METHOD, parents, [0, 1, 2], 40, **settings)
    assert again.timed == 0
    np.testing.assert_array_equal(again.best, whole.best)
    with pytest.raises(UserError, match="40 evaluations already"):
        run(METHOD, parents, [0, 1, 2], 30, **settings)
    with pytest.raises(UserError, match="another run"):
        run(METHOD, parents, [0, 1, 2], 40, **(settings | {"identity": {"a": 2}}))


def test_two_processes_do_not_share_a_work_directory(tmp_path):
    held = lock_directory(tmp_path)
    with pytest.raises(UserError, match="in use"):
        run(METHOD, parents, [0], 10, workdir=tmp_path)
    held.close()
    for _ in range(2):  # and it is free again when a run ends
        run(METHOD, parents, [0], 10, workdir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make"):
        run(METHOD, parents, [0], 10, workdir=tmp_path / "file" / "below")


def test_steps_of_several_evaluations_are_rounded_up():
    pytest.importorskip("evosax", reason="CMA-ES needs evosax")
    method = baselines.cma_es(score, jnp.zeros(6), population=8, std=0.3)
    found = run(method, parents, [0], 20, every=5)
    assert found.evaluations == 24
    np.testing.assert_array_equal(found.curve["evaluations"], [0, 8, 16, 24])


def test_mistakes():
    with pytest.raises(UserError, match="at least one"):
        run(METHOD, parents, [], 10)
    with pytest.raises(UserError, match="at least one"):
        run(METHOD, parents, [0], 0)
