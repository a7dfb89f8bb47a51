"""Fitness, attraction, draws and replacement against a slow transcription of the formulae."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.fusion import archive as archives
from fedasr.fusion import competition

KINDS = st.sampled_from(["binary", "continuous", "zero", "constant"])


def table(kind, seed, models=6, points=9):
    """Scores with ties, points that nobody solves and empty slots."""
    rng = np.random.default_rng(seed)
    scores = rng.random((models, points))
    if kind == "binary":
        scores = np.round(scores)
    elif kind != "continuous":
        scores = np.full((models, points), 0.0 if kind == "zero" else 0.7)
    scores[:, rng.random(points) < 0.2] = 0.0
    scores[rng.random(models) < 0.2] = 0.0
    return scores.astype(np.float32)


def slow_fitness(scores, alpha, capacity):
    found = []
    for i in range(len(scores)):
        total = 0.0
        for j in range(scores.shape[1]):
            z = sum(float(scores[k, j]) for k in range(len(scores)))
            if z > 0:
                c = max(map(float, scores[:, j])) if capacity == "max" else 1.0
                total += c * float(scores[i, j]) / z**alpha
        found.append(total)
    return np.array(found)


def slow_attraction(scores, a, capacity):
    found = []
    for b in range(len(scores)):
        total = 0.0
        for j in range(scores.shape[1]):
            z = sum(float(scores[k, j]) for k in range(len(scores)))
            if z > 0:
                c = max(map(float, scores[:, j])) if capacity == "max" else 1.0
                total += c / z * max(float(scores[b, j]) - float(scores[a, j]), 0.0)
        found.append(total)
    return np.array(found)


@settings(max_examples=60, deadline=None)
@given(
    KINDS, st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["max", "one"])
)
def test_fitness_and_attraction(kind, seed, alpha, capacity):
    scores = table(kind, seed)
    found = competition.fitness(jnp.array(scores), alpha, capacity)
    np.testing.assert_allclose(found, slow_fitness(scores, alpha, capacity), rtol=2e-5, atol=1e-6)
    a = seed % len(scores)
    found = competition.attraction(jnp.array(scores), a, capacity)
    np.testing.assert_allclose(found, slow_attraction(scores, a, capacity), rtol=2e-5, atol=1e-6)
    assert found[a] == 0


def test_fitness_adds_up_to_what_is_solved():
    """With alpha 1 every solved point is divided up whole."""
    scores = jnp.array(table("binary", 3))
    assert competition.fitness(scores).sum() == pytest.approx(int((scores.sum(0) > 0).sum()))


def test_subnormal_scores_do_not_divide_by_zero():
    scores = jnp.full((3, 2), 1e-30)
    for alpha in (0.0, 1.0):
        assert jnp.isfinite(competition.fitness(scores, alpha)).all()
    assert jnp.isfinite(competition.attraction(scores, 0)).all()


def test_unknown_capacity():
    with pytest.raises(UserError, match="capacity"):
        competition.fitness(jnp.ones((2, 2)), 1.0, "min")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_draw_is_never_impossible(seed, models, extreme):
    rng = np.random.default_rng(seed)
    weights = rng.random(models) * 10.0 ** rng.integers(-20, 20 if extreme else 0, models)
    weights[rng.random(models) < 0.5] = 0.0
    weights[rng.integers(models)] = 1.0
    weights = weights.astype(np.float32)
    for uniform in (0.0, 1 - 2.0**-24, *rng.random(5)):
        assert weights[competition.draw(jnp.array(weights), jnp.float32(uniform))] > 0


def test_draw_is_proportional():
    weights = jnp.array([0.0, 3.0, 0.0, 1.0, 4.0])
    grid = (jnp.arange(8000) + 0.5) / 8000
    found = np.bincount(jax.vmap(lambda u: competition.draw(weights, u))(grid), minlength=5)
    np.testing.assert_array_equal(found, [0, 3000, 0, 1000, 4000])


def slow_insert(scores, filled, child, alpha, capacity):
    """(scores, filled, slot or None) after a child came."""
    scores, filled = scores.copy(), filled.copy()
    if not filled.all():
        slot = filled.tolist().index(False)
    else:
        values = slow_fitness(np.vstack([scores, child[None]]), alpha, capacity)
        # Of equals (up to rounding) the first goes.
        slot = next(i for i, v in enumerate(values) if v <= values.min() + 1e-5)
        if slot == len(scores):
            return scores, filled, None
    scores[slot], filled[slot] = child, True
    return scores, filled, slot


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(0, 10**6), st.sampled_from([0.0, 1.0]), st.sampled_from(["max", "one"]))
def test_replacement(kind, seed, alpha, capacity):
    rng = np.random.default_rng(seed)
    scores = table(kind, seed)
    filled = rng.random(len(scores)) < 0.8
    scores[~filled] = 0.0
    child = table(kind, seed + 1)[0]
    params = {"w": np.arange(6.0, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)}
    archive = archives.Archive(*jax.tree.map(jnp.array, (params, scores, filled)))
    slot = archives.loser(archive.scores, archive.filled, child, alpha, capacity)
    found = archives.replace(archive, slot, {"w": jnp.full(3, 99.0)}, child)
    want_scores, want_filled, want_slot = slow_insert(scores, filled, child, alpha, capacity)
    values = slow_fitness(np.vstack([scores, child[None]]), alpha, capacity)
    if filled.all() and (np.sort(values)[1] - values.min() < 1e-5) and kind == "continuous":
        return  # rounding decides
    assert int(slot) == (6 if want_slot is None else want_slot)
    np.testing.assert_array_equal(found.scores, want_scores)
    np.testing.assert_array_equal(found.filled, want_filled)
    if want_slot is not None:
        params["w"][want_slot] = 99.0
    np.testing.assert_array_equal(found.params["w"], params["w"])


def test_an_unfit_child_changes_nothing():
    rng = np.random.default_rng(0)
    params, scores = {"w": jnp.array(rng.random((3, 2)))}, jnp.array(rng.random((3, 4)))
    archive = archives.Archive(params, scores, jnp.ones(3, bool))
    child = jnp.zeros(4)
    slot = archives.loser(archive.scores, archive.filled, child)
    assert slot == 3
    found = archives.replace(archive, slot, {"w": jnp.full(2, 99.0)}, child)
    jax.tree.map(np.testing.assert_array_equal, found, archive)


def test_a_child_as_good_as_all_replaces_the_first():
    scores = jnp.full((3, 4), 0.5)
    assert archives.loser(scores, jnp.ones(3, bool), scores[0]) == 0


def test_a_broken_child_is_dropped_and_never_the_best():
    scores = archives.clean(jnp.array([jnp.nan, jnp.inf, -1.0, 0.5]))
    np.testing.assert_array_equal(scores, [0.0, 0.0, 0.0, 0.5])
    full = jnp.full((2, 4), 0.5)
    assert archives.loser(full, jnp.ones(2, bool), jnp.zeros(4)) == 2
    archive = archives.Archive(
        jnp.zeros((3, 1)), jnp.zeros((3, 4)), jnp.array([False, True, False])
    )
    assert archives.best(archive) == 1


def test_coverage_and_entropy():
    scores = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    filled = jnp.array([True, True, False])
    assert competition.coverage(scores) == 0.5
    assert competition.entropy(scores, filled) == pytest.approx(0.25)  # one point in four is split
    p = 1 / 4
    alone = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    quarter = jnp.array([[1.0], [0.0], [0.0], [0.0]])
    assert competition.entropy(quarter, jnp.ones(4, bool)) == pytest.approx(alone)
    assert competition.entropy(jnp.ones((3, 5)), jnp.ones(3, bool)) == 0
