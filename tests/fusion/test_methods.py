"""Methods as a whole: M2N2 against a slow loop, the baselines against what they must find."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.fusion import archive as archives
from fedasr.fusion import baselines, host, methods
from fedasr.fusion.crossover import mutate
from fedasr.fusion.methods import Evolution

TASK = np.random.default_rng(0).standard_normal((15, 8)).astype(np.float32)


def binary(params):
    """15 points, right on which side of a plane a model of 8 parameters lies."""
    return (jnp.sum(TASK * jnp.concatenate([params["a"], params["b"].ravel()]), 1) > 0) * 1.0


def smooth(params):
    return jax.nn.sigmoid(jnp.sum(TASK * jnp.concatenate([params["a"], params["b"].ravel()]), 1))


def models(count, seed=1):
    flat = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    return {"a": jnp.array(flat[:, :2]), "b": jnp.array(flat[:, 2:].reshape(count, 2, 3))}


def flatten(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def pick(weights, uniform):
    return int(np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right"))


def slow_m2n2(score, parents, steps, key, evolution, slots):
    """The archive as a list of vectors, formulae with loops, scores by the task alone.

    slots: where each child went, or the population for nowhere; asked only between the equally
    unfit, whom rounding tells apart.
    """

    def scored(flat):
        tree = {"a": jnp.array(flat[:2]), "b": jnp.array(flat[2:].reshape(2, 3))}
        return np.float64(np.float32(score(tree)))

    def fitness(rows):
        z = rows.sum(0)
        c = rows.max(0)
        w = np.array([c[j] / z[j] ** evolution.alpha if z[j] > 0 else 0 for j in range(len(z))])
        return (rows * w).sum(1)

    def slerp(a, b, w):
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        angle = np.arccos(np.clip(cosine, -1, 1))
        if np.sin(angle) < 1e-6:
            return (1 - w) * a + w * b
        return (np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)

    population = []

    def insert(child, slot=None):
        population.append((child, scored(child)))
        if len(population) > evolution.population:
            values = fitness(np.stack([s for _, s in population]))
            unfit = np.flatnonzero(values <= values.min() + 1e-5)
            newest = population.pop()
            gone = slot if slot in unfit else unfit[0]
            if gone < len(population):
                population[gone] = newest

    for flat in parents:
        insert(np.float64(flat))
    for i in range(steps):
        choice, noise = (jax.random.fold_in(jax.random.fold_in(key, i), n) for n in (0, 1))
        u = np.float64(jax.random.uniform(choice, (4,)))
        rows = np.stack([s for _, s in population])
        f = fitness(rows)
        a = pick(f, u[0])
        if evolution.attraction:
            z, c = rows.sum(0), rows.max(0)
            g = (np.maximum(rows - rows[a], 0) * np.where(z > 0, c / np.maximum(z, 1e-9), 0)).sum(1)
            if not g.any():
                g = np.where(np.arange(len(f)) == a, 0, f)
            b = pick(g if g.any() else np.ones(len(f)), u[1])
        else:
            b = pick(f, u[1])
        a, b = population[a][0], population[b][0]
        split = int(u[3] * 8) if evolution.split else 8
        child = np.concatenate([slerp(a, b, u[2])[:split], slerp(a, b, 1 - u[2])[split:]])
        if evolution.mutation:
            drawn = mutate({"a": jnp.zeros(2), "b": jnp.zeros((2, 3))}, noise, evolution.mutation)
            child = child + np.float64(flatten(drawn))
        insert(child, slots[i])
    return population


@pytest.mark.parametrize("score", [binary, smooth])
@pytest.mark.parametrize(
    "evolution",
    [
        Evolution(population=5, mutation=0.3),
        Evolution(population=4, mutation=0.0),
        Evolution(population=4, mutation=0.3, alpha=0.0, attraction=False, split=False),
    ],
)
def test_m2n2_is_the_slow_loop(score, evolution):
    key, steps = jax.random.key(3), 25
    method = methods.evolve(score, evolution)
    state = jax.jit(method.init)(models(3), key)
    step = jax.jit(method.step)
    slots = []
    for i in range(steps):
        before, state = state, step(state, jax.random.fold_in(key, i), i)
        moved = np.flatnonzero((before.params["a"] != state.params["a"]).any(1))
        assert len(moved) <= 1
        slots.append(moved[0] if len(moved) else evolution.population)
    parents = [flatten(jax.tree.map(lambda x, i=i: x[i], models(3))) for i in range(3)]
    want = slow_m2n2(score, parents, steps, key, evolution, slots)
    assert int(state.filled.sum()) == len(want) == evolution.population
    for slot, (flat, scores) in enumerate(want):
        np.testing.assert_allclose(flatten(archives.take(state, slot)), flat, atol=2e-4)
        np.testing.assert_allclose(state.scores[slot], scores, atol=2e-4)


def test_the_host_archive_is_the_device_archive():
    evolution = Evolution(population=4, mutation=0.2, chromosome=lambda path: path)
    key, parents = jax.random.key(5), models(2)
    method = methods.evolve(smooth, evolution)
    state = jax.jit(method.init)(parents, key)
    step = jax.jit(method.step)
    singles = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), parents) for i in range(2)]
    python_score = lambda params: np.asarray(smooth(params))  # noqa: E731
    archive = host.start(python_score, evolution, singles)
    run = host.steps(python_score, evolution, archive, key)
    for i in range(12):
        state = step(state, jax.random.fold_in(key, i), i)
        archive = next(run)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(archive))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), archive, state)
    # It goes on from a copy, as from a checkpoint.
    copy = jax.tree.map(np.array, archive)
    resumed = next(host.steps(python_score, evolution, copy, key, first=12))
    jax.tree.map(np.testing.assert_array_equal, resumed, next(run))


def evolve(method, parents, steps, seed=0):
    key = jax.random.key(seed)

    def body(i, state):
        return method.step(state, jax.random.fold_in(key, i), i)

    return jax.jit(lambda p: jax.lax.fori_loop(0, steps, body, method.init(p, key)))(parents)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constant_scores_keep_evolving(constant):
    """Nobody is fitter or more attractive: any parents, and never a NaN."""

    def score(params):
        return jnp.full(4, constant)

    state = evolve(methods.evolve(score, Evolution(population=4)), models(2), 30)
    assert bool(state.filled.all())
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert (state.scores == constant).all()


def test_one_parent_alone_is_its_own_partner():
    evolution = Evolution(population=3, mutation=0.0)
    parent = models(1)
    state = evolve(methods.evolve(smooth, evolution), parent, 5)
    for slot in range(3):
        child = archives.take(state, slot)
        np.testing.assert_allclose(flatten(child), flatten(parent), rtol=1e-5)


def test_a_model_that_breaks_never_enters_a_full_archive():
    def score(params):
        return jnp.where(params["a"][0] > 0.3, jnp.nan, smooth(params))

    state = evolve(methods.evolve(score, Evolution(population=4, mutation=0.5)), models(2), 60)
    assert (state.params["a"][:, 0] <= 0.3).all()


def test_negative_scores_are_refused_on_the_host():
    single = jax.tree.map(lambda x: np.asarray(x[0]), models(1))
    with pytest.raises(UserError, match="lie between 0 and 1"):
        host.start(lambda params: np.float32([0.5, -2]), Evolution(population=2), [single])


def test_attraction_finds_the_complement():
    """A solves the left half, B the right one, C little: A's partner is B."""
    scores = jnp.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0.0]])
    filled = jnp.ones(3, bool)

    def partners(key):
        return jnp.stack(methods.choose(Evolution(), scores, filled, key, (10,)).parents)

    a, b = np.asarray(jax.vmap(partners)(jax.random.split(jax.random.key(0), 200))).T
    assert (b[a == 0] == 1).all() and (b[a == 1] != 1).all()
    assert set(a) == {0, 1, 2}


def test_split_points_cover_the_chromosome():
    def splits(key):
        scores = jnp.ones((2, 3))
        return methods.choose(Evolution(), scores, jnp.ones(2, bool), key, (4, 7)).split

    found = np.asarray(jax.vmap(splits)(jax.random.split(jax.random.key(0), 400)))
    assert set(found[:, 0]) == set(range(4)) and set(found[:, 1]) == set(range(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, "population"),
        ({"alpha": -1.0}, "alpha"),
        ({"merge": False, "mutation": 0.0}, "equal their parent"),
        ({"capacity": "least"}, "capacity"),
    ],
)
def test_impossible_rules(options, message):
    with pytest.raises(UserError, match=message):
        Evolution(**options)


def test_ablations_are_what_they_say():
    base = Evolution()
    ablated = {name: methods.make_evolution(name, base) for name in methods.ABLATIONS}
    assert ablated["m2n2"] == base
    assert ablated["ga"] == dataclasses.replace(base, alpha=0.0, attraction=False)
    assert not ablated["no_split"].split and ablated["no_split"].attraction
    assert not ablated["no_attraction"].attraction and ablated["no_attraction"].alpha == 1
    assert not ablated["no_crossover"].merge


# ------------------------------------------------------------------------------------- baselines


def test_map_elites_keeps_the_best_of_each_cell():
    mask = np.arange(15) % 2 == 1
    method = methods.map_elites(smooth, methods.halves(mask), 4, Evolution(mutation=0.5))
    state = evolve(method, models(3), 80)
    filled = np.flatnonzero(state.filled)
    assert len(filled) > 2
    for slot in filled:
        scores = np.asarray(smooth(archives.take(state, slot)))
        np.testing.assert_allclose(scores, state.scores[slot], atol=1e-5)
        place = [min(int(scores[part].mean() * 4), 3) for part in (mask, ~mask)]
        assert place[0] * 4 + place[1] == slot
    later = evolve(method, models(3), 160)
    before, after = state.scores.mean(1), later.scores.mean(1)
    assert (after[filled] >= before[filled]).all()
    with pytest.raises(UserError, match="halves"):
        methods.halves(np.ones(4, bool))


def draws(scores, filled, count=4000, **settings):
    """Parents that MAP-Elites draws: int [count, 2]."""

    def pair(key):
        chosen = methods.choose_elites(Evolution(), scores, filled, key, (10,), **settings)
        return jnp.stack(chosen.parents)

    return np.asarray(jax.vmap(pair)(jax.random.split(jax.random.key(0), count)))


def test_map_elites_draws_parents_by_quality_without_replacement():
    quality = np.array([0.5, 0.0, 0.3, 0.9, 0.2])  # nobody is in cell 3
    scores = jnp.asarray(np.repeat(quality[:, None], 4, 1), jnp.float32)
    filled = jnp.array([True, True, True, False, True])
    found = draws(scores, filled)
    a, b = found.T
    assert (a != b).all() and set(a) == {0, 2, 4}
    np.testing.assert_allclose(np.bincount(a, minlength=5) / len(a), quality * filled, atol=0.03)
    # The second by quality among the others.
    after = b[a == 0]
    np.testing.assert_allclose(np.mean(after == 2), 0.6, atol=0.04)
    assert (after != 1).all() and (b != 3).all()


def test_map_elites_draws_as_the_public_code_while_qualities_sum_to_less_than_2():
    scores = jnp.full((3, 4), 0.5)
    same = np.mean(np.equal(*draws(scores, jnp.ones(3, bool), again_below=2.0).T))
    assert same == pytest.approx(1 / 3, abs=0.03)
    assert not np.equal(*draws(jnp.full((3, 4), 0.7), jnp.ones(3, bool), again_below=2.0).T).any()


@pytest.mark.parametrize("quality", [0.0, 0.5])
def test_map_elites_with_few_models(quality):
    """One alone is its own partner; of models that solve nothing any two that differ."""
    one = jnp.array([False, True, False])
    assert (draws(jnp.full((3, 4), quality), one, 20) == 1).all()
    two = jnp.array([True, True, False])
    found = draws(jnp.array([[quality] * 4, [0.0] * 4, [0.9] * 4]), two, 50)
    assert set(map(tuple, found)) <= {(0, 1), (1, 0)}


def test_fractions_are_evenly_spread():
    found = np.sort(jax.vmap(baselines.fraction)(jnp.arange(64)))
    np.testing.assert_array_equal(found, np.arange(64) / 64)


def vector(*values):
    return jnp.array(values, jnp.float32)


def test_mixing_ratio_finds_the_ratio():
    target = np.array([np.cos(0.3 * np.pi / 2), np.sin(0.3 * np.pi / 2)])
    method = baselines.mixing_ratio(lambda p: jnp.exp(-jnp.sum(jnp.square(p - target)))[None])
    state = evolve(method, jnp.eye(2), 256)
    np.testing.assert_allclose(method.best(state), target, atol=0.005)
    three = np.array([0.2, 0.5, 0.3])
    method = baselines.mixing_ratio(lambda p: jnp.exp(-jnp.sum(jnp.square(p - three)))[None])
    np.testing.assert_allclose(method.best(evolve(method, jnp.eye(3), 500)), three, atol=0.06)


def test_the_average_is_the_average():
    method = baselines.uniform_average(smooth)
    parents = models(3)
    for steps in (0, 2):
        best = method.best(evolve(method, parents, steps))
        want = jax.tree.map(lambda x: np.asarray(x).mean(0), parents)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), best, want)


def test_task_arithmetic_adds_the_moves():
    base = vector(1, 1)
    parents = jnp.stack([vector(2, 1), vector(1, 3)])
    target = 1 + 0.75 * np.array([1.0, 2.0])
    method = baselines.task_arithmetic(
        lambda p: jnp.exp(-jnp.sum(jnp.square(p - target)))[None], np.asarray(base)
    )
    np.testing.assert_allclose(method.best(evolve(method, parents, 64)), target, atol=1e-6)


def test_cma_es_climbs():
    pytest.importorskip("evosax", reason="CMA-ES needs evosax")
    like = {"a": jnp.zeros(2), "b": jnp.zeros((2, 3))}
    method = baselines.cma_es(smooth, like, population=6, std=0.3)
    state = evolve(method, models(2), 15)
    scores, filled = method.scores(state)
    assert scores.shape == (6, 15) and bool(filled.all())
    start = jax.tree.map(lambda x: x.mean(0), models(2))
    assert smooth(method.best(state)).mean() > smooth(start).mean() + 0.05
    np.testing.assert_allclose(smooth(method.best(state)), state.best_scores, atol=1e-5)
