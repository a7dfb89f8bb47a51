"""Searches that are scored from outside JAX: the same as those within it, resumed, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.fusion import baselines, methods, outside
from fedasr.fusion.run import run

TASK = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
PARENTS = np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32)
EVOLUTION = methods.Evolution(population=4, mutation=0.2)


def score(params):
    return jax.nn.sigmoid(jnp.sum(TASK * params["w"], 1))


def score_in_numpy(params):
    assert isinstance(params["w"], np.ndarray)
    return 1 / (1 + np.exp(-(TASK * params["w"]).sum(1)))


def make(name, task=score):
    if name in methods.ABLATIONS:
        return methods.evolve(task, methods.make_evolution(name, EVOLUTION))
    if name == "map_elites":
        return methods.map_elites(task, methods.halves(np.arange(12) % 2 == 1), 4, EVOLUTION)
    if name == "cma_es":
        pytest.importorskip("evosax", reason="CMA-ES needs evosax")
        return baselines.cma_es(task, {"w": jnp.zeros(6)}, 4, 0.3)
    if name == "task_arithmetic":
        return baselines.task_arithmetic(task, {"w": np.ones(6, np.float32)})
    return baselines.mixing_ratio(task)


def never(params):
    raise AssertionError("its own score is not used")


def search(method, evaluations, **settings):
    models = [{"w": x} for x in PARENTS]
    rows = np.stack([score_in_numpy(x) for x in models])
    return outside.search(method, score_in_numpy, models, rows, 3, evaluations, **settings)


@pytest.mark.parametrize("name", ["m2n2", "map_elites", "task_arithmetic", "mixing_ratio"])
def test_it_is_the_search_within_jax(name):
    inside = run(make(name), lambda key: {"w": jnp.asarray(PARENTS)}, [3], 24, every=8)
    found = search(make(name, never), 24, every=8)
    assert found.evaluations == 24 and found.timed == 23
    np.testing.assert_allclose(found.best["w"], inside.best["w"], atol=2e-5)
    assert found.curve.keys() == inside.curve.keys()
    for key, values in inside.curve.items():
        np.testing.assert_allclose(found.curve[key], values, atol=2e-5, err_msg=key)


def test_the_score_runs_where_it_would_without_the_search():
    usual, other = jax.devices()[:2]

    def on_jax(params):
        values = score(params)
        assert values.devices() == {usual}
        return values

    models = [{"w": x} for x in PARENTS]
    rows = np.stack([score_in_numpy(x) for x in models])
    outside.search(make("m2n2", never), on_jax, models, rows, 3, 2, device=other)


def test_cma_es_begins_with_the_best_parent_and_climbs():
    found = search(make("cma_es", never), 40, every=8)
    parents = [score_in_numpy({"w": x}).mean() for x in PARENTS]
    mean = found.curve["score"]
    assert mean[0, 0] == pytest.approx(max(parents), abs=1e-6)
    best = score_in_numpy({"w": found.best["w"][0]}).mean()
    assert best > max(parents)


def test_the_average_is_scored_once():
    found = search(baselines.uniform_average(never), 1)
    np.testing.assert_allclose(found.best["w"][0], PARENTS.mean(0), atol=1e-6)
    want = score_in_numpy({"w": PARENTS.mean(0)}).mean()
    assert found.curve["score"][-1, 0] == pytest.approx(want, abs=1e-6)


def test_resumed(tmp_path):
    whole = search(make("m2n2", never), 20, every=5)
    settings = {"every": 5, "workdir": tmp_path, "identity": {"a": 1}, "save_seconds": 0}
    search(make("m2n2", never), 11, **settings)
    lines = []
    rest = search(make("m2n2", never), 20, log=lines.append, **settings)
    assert lines[0] == "going on from 11 evaluations"
    np.testing.assert_array_equal(rest.best["w"], whole.best["w"])
    last = {key: values[-1] for key, values in whole.curve.items()}
    jax.tree.map(np.testing.assert_array_equal, {k: v[-1] for k, v in rest.curve.items()}, last)
    with pytest.raises(UserError, match="20 evaluations already"):
        search(make("m2n2", never), 12, **settings)
    with pytest.raises(UserError, match="another run"):
        search(make("m2n2", never), 20, **(settings | {"identity": {"a": 2}}))


def test_halves_of_bfloat16_stay_what_they_are():
    models = [{"w": x.astype(jnp.bfloat16)} for x in PARENTS]
    seen = []

    def spy(params):
        seen.append(params["w"].dtype)
        return score_in_numpy({"w": params["w"].astype(np.float32)})

    rows = outside.parent_scores(spy, models, ["a", "b"])
    for name in ("m2n2", "cma_es"):
        like = {"w": jax.ShapeDtypeStruct((6,), jnp.bfloat16)}
        method = baselines.cma_es(never, like, 4) if name == "cma_es" else make(name, never)
        found = outside.search(method, spy, models, rows, 0, 8)
        assert found.best["w"].dtype == jnp.bfloat16
    assert set(seen) == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (np.float32([0.5, -0.1]), "score of -0.1"),
        (np.float32([0.5, 2]), "score of 2"),
        (0.5, "one number for each data point"),
        (np.ones((2, 2)), "one number for each data point"),
        ([], "one number for each data point"),
        ("good", "NumPy cannot read"),
        (np.ones(3), "3 numbers, and 2 before"),
    ],
)
def test_scores_that_are_refused(gives, message):
    with pytest.raises(UserError, match=message):
        outside.checked(gives, 2)


def test_a_broken_child_counts_as_0_and_a_broken_parent_is_refused():
    assert np.isnan(outside.checked([np.nan, 1.0], 2)[0])
    assert outside.checked([True, False]).dtype == np.float32
    with pytest.raises(UserError, match="score of b is not finite"):
        outside.parent_scores(lambda x: [x, 1.0 * x], [0.5, np.inf], ["a", "b"])


# ----------------------------------------------------------------- the same refusals within JAX


@pytest.mark.parametrize("name", ["m2n2", "map_elites", "mixing_ratio", "cma_es"])
def test_negative_scores_are_refused_within_jax(name):
    def loss(params):
        return score(params) - 0.7

    with pytest.raises(UserError, match=r"score of -0\.\d+, but scores lie between 0 and 1"):
        run(make(name, loss), lambda key: {"w": jnp.asarray(PARENTS)}, [0], 20, every=10)


def test_children_with_negative_scores_are_refused_too():
    """The parents' are positive; of parents further away some are not."""

    def reward(params):
        return jnp.minimum(score(params), 3.0 - jnp.abs(params["w"]).max())

    assert all(np.asarray(reward({"w": x})).min() >= 0 for x in PARENTS)
    method = methods.evolve(reward, methods.Evolution(population=4, mutation=1.0))
    with pytest.raises(UserError, match="score of -"):
        run(method, lambda key: {"w": jnp.asarray(PARENTS)}, [0], 60, every=20)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda p: jnp.asarray(np.asarray(p["w"])),
        lambda p: p["w"] if p["w"][0] > 0 else -p["w"],
        lambda p: (_ for _ in ()).throw(TypeError("got DynamicJaxprTracer")),
    ],
)
def test_scores_of_other_frameworks_are_told_where_to_go(foreign):
    with pytest.raises(UserError, match=r"fedasr\.fusion\.outside"):
        run(make("m2n2", foreign), lambda key: {"w": jnp.asarray(PARENTS)}, [0], 5)
