"""SLERP crossover against float64 numpy on the flat vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.fusion import crossover as module
from fedasr.fusion import methods
from fedasr.fusion.crossover import (
    chromosome_sizes,
    crossover,
    leaf_chromosomes,
    leaf_order,
    mutate,
    slerp,
    split_points,
    split_unit,
)

SHAPES = {"decoder": {"bias": (3,), "kernel": (4, 3)}, "encoder": {"kernel": (2, 2, 2)}}
SIZE = 23


def model(flat):
    flat = np.asarray(flat, np.float32)
    ends = [3, 15]
    bias, kernel, other = np.split(flat, ends)
    return {
        "decoder": {"bias": jnp.array(bias), "kernel": jnp.array(kernel.reshape(4, 3))},
        "encoder": {"kernel": jnp.array(other.reshape(2, 2, 2))},
    }


def flatten(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def slow_slerp(a, b, w):
    """Textbook formula in float64."""
    a, b = np.float64(a), np.float64(b)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if norms == 0:
        return (1 - w) * a + w * b
    angle = np.arccos(np.clip(a @ b / norms, -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - w) * a + w * b
    return (np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)


def slow_crossover(a, b, w, split):
    return np.concatenate([slow_slerp(a, b, w)[:split], slow_slerp(a, b, 1 - w)[split:]])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(0, SIZE))
def test_crossover_of_the_whole(seed, w, split):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, SIZE)).astype(np.float32) * rng.choice([0.01, 1, 100], (2, 1))
    found = _whole(model(a), model(b), jnp.full(1, w, jnp.float32), jnp.full(1, split, jnp.int32))
    scale = max(np.abs(a).max(), np.abs(b).max())
    np.testing.assert_allclose(
        flatten(found) / scale, slow_crossover(a, b, w, split) / scale, atol=5e-6
    )


_whole = jax.jit(lambda a, b, ratio, split: crossover(a, b, ratio, split, (0, 0, 0)))


def test_chromosomes_are_merged_on_their_own():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, SIZE))
    chromosomes = leaf_chromosomes(model(a), lambda path: path.split("/")[0])
    assert chromosomes == (0, 0, 1)
    assert chromosome_sizes(model(a), chromosomes) == (15, 8)
    ratio, split = jnp.array([0.3, 0.9]), jnp.array([7, 2], jnp.int32)
    found = flatten(crossover(model(a), model(b), ratio, split, chromosomes))
    want = [
        slow_crossover(a[part], b[part], w, s)
        for part, w, s in ((slice(0, 15), 0.3, 7), (slice(15, SIZE), 0.9, 2))
    ]
    np.testing.assert_allclose(found, np.concatenate(want), atol=5e-6)
    # Leaves of one chromosome need not be neighbours.
    kinds = leaf_chromosomes(model(a), lambda path: path.split("/")[-1])
    assert kinds == (0, 1, 1) and chromosome_sizes(model(a), kinds) == (3, 20)
    apart = crossover(model(a), model(b), ratio, jnp.array([3, 14]), (0, 1, 0))
    own = np.concatenate([np.arange(3), np.arange(15, SIZE)])
    np.testing.assert_allclose(
        flatten(apart)[own], slow_crossover(a[own], b[own], 0.3, 3), atol=5e-6
    )


@pytest.mark.parametrize("w", [0.0, 0.25, 0.5, 1.0])
def test_degenerate_vectors(w):
    a = np.random.default_rng(1).standard_normal(SIZE)
    line = lambda x, y: flatten(slerp(model(x), model(y), w))  # noqa: E731
    np.testing.assert_allclose(line(a, a), a, rtol=1e-5)
    np.testing.assert_allclose(line(a, 3 * a), (1 + 2 * w) * a, rtol=1e-5)  # parallel
    np.testing.assert_allclose(line(a, -a), (1 - 2 * w) * a, atol=1e-5)  # opposite
    np.testing.assert_allclose(line(a, 0 * a), (1 - w) * a, atol=1e-6)
    np.testing.assert_allclose(line(0 * a, a), w * a, atol=1e-6)
    np.testing.assert_array_equal(line(0 * a, 0 * a), 0 * a)


def test_nearly_parallel_vectors_keep_their_precision():
    rng = np.random.default_rng(2)
    a, d = rng.standard_normal((2, SIZE))
    for size in (1e-2, 1e-4):
        found = flatten(slerp(model(a), model(a + size * d), 0.3))
        np.testing.assert_allclose(found, slow_slerp(a, a + size * d, 0.3), atol=1e-6)


def test_ends_norm_and_symmetry():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, SIZE))
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(flatten(slerp(model(a), model(b), 0.0)), a, atol=1e-6)
    np.testing.assert_allclose(flatten(slerp(model(a), model(b), 1.0)), b, atol=1e-6)
    mid = flatten(slerp(model(a), model(b), 0.4))
    assert np.linalg.norm(mid) == pytest.approx(np.linalg.norm(a), rel=1e-5)
    np.testing.assert_allclose(mid, flatten(slerp(model(b), model(a), 0.6)), atol=1e-6)


def test_integers_and_types():
    a = {"half": jnp.ones(4, jnp.bfloat16), "steps": jnp.array([1, 2]), "w": jnp.ones(3)}
    b = {"half": -jnp.ones(4, jnp.bfloat16), "steps": jnp.array([5, 6]), "w": jnp.zeros(3)}
    child = crossover(a, b, jnp.full(1, 0.5), jnp.full(1, 5), leaf_chromosomes(a))
    child = mutate(child, jax.random.key(0), 0.1)
    np.testing.assert_array_equal(child["steps"], a["steps"])
    assert [x.dtype for x in jax.tree.leaves(child)] == [x.dtype for x in jax.tree.leaves(a)]


def noises(keys, size=20_000):
    """Standard normal noise of many mutations: float64 [keys, size]."""
    like = {"a": jnp.zeros((size // 4, 2)), "b": jnp.zeros(size // 2)}
    draw = jax.jit(jax.vmap(lambda key: mutate(like, key, 1.0)))
    return np.concatenate(
        [np.reshape(x, (len(keys), -1)) for x in jax.tree.leaves(draw(keys))], 1
    ).astype(np.float64)


def test_mutation_is_normal():
    stats = pytest.importorskip("scipy.stats", reason="scipy is needed for the distribution")
    found = noises(jax.random.split(jax.random.key(1), 20))
    assert stats.kstest(found.ravel(), "norm").pvalue > 1e-3
    tail = (np.abs(found) > 4).sum()  # 25 expected
    assert 5 < tail < 60 and np.abs(found).max() < 5.4


def test_mutations_are_independent():
    """Of neighbours, of parameters in other leaves, of the step before, of another seed."""
    steps = [
        jax.random.fold_in(jax.random.fold_in(jax.random.key(s), 2), i)
        for s in (0, 1)
        for i in range(4)
    ]
    found = noises(jnp.stack(steps))
    bound = 5 / np.sqrt(found.shape[1])
    correlations = np.corrcoef(found) - np.eye(len(found))
    assert np.abs(correlations).max() < bound
    for lag in (1, 2, 3, 4, 8, 64, 128, 256, 1024, 10_000):
        for row in found:
            same = np.corrcoef(row[:-lag], row[lag:])[0, 1]
            assert abs(same) < 5 / np.sqrt(len(row) - lag), lag
    squares = np.corrcoef(found**2) - np.eye(len(found))
    assert np.abs(squares).max() < bound
    # Over many mutations every parameter averages to nothing.
    means = noises(jax.random.split(jax.random.key(7), 400), 400).mean(0)
    assert np.abs(means).max() < 5 / 20 and means.std() == pytest.approx(1 / 20, rel=0.2)


def test_mutation_has_the_stated_size():
    like = {"a": jnp.full((50, 40), 3.0), "b": jnp.full(7, 3.0)}
    change = flatten(mutate(like, jax.random.key(1), 0.01)) - 3.0
    assert change.std() == pytest.approx(0.01, rel=0.05)
    assert mutate(like, jax.random.key(1), 0.0) is like


# --------------------------------------------------------------------------------- order by depth


def test_blocks_are_in_order_of_their_numbers():
    """A split point after block_2 of twelve blocks leaves block_10 to the other side."""
    names = [f"block_{i}" for i in range(12)]
    a, b = ({name: jnp.full(2, value) for name in names} for value in (1.0, -3.0))
    split = jnp.array([2 * 3], jnp.int32)
    child = crossover(a, b, jnp.zeros(1), split, leaf_chromosomes(a))
    for i, name in enumerate(names):
        np.testing.assert_allclose(child[name], 1.0 if i < 3 else -3.0, atol=1e-6)


def test_order_of_nested_and_dotted_names():
    like = {
        "encoder": {"block_10": {"w": 0, "b": 0}, "block_9": {"w": 0}, "block_1a": {"w": 0}},
        "model.layers.2.w": 0,
        "model.layers.11.w": 0,
        "model.layers.02.w": 0,
        "list": [0] * 11,
    }
    leaves = jax.tree_util.tree_leaves_with_path(like)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    found = [paths[i] for i in leaf_order(like)]
    assert found == [
        *("encoder/block_1a/w", "encoder/block_9/w", "encoder/block_10/b", "encoder/block_10/w"),
        *(f"list/{i}" for i in range(11)),
        *("model.layers.02.w", "model.layers.2.w", "model.layers.11.w"),
    ]


@settings(max_examples=100, deadline=None)
@given(st.sets(st.text("ab_-./AZ19\u00e9", max_size=6), min_size=1))
def test_without_numbers_of_several_digits_the_order_is_that_of_jax(names):
    names = {name for name in names if not any(x + y in name for x in "19" for y in "19")}
    assert leaf_order({name: {"x": 0, "y": 0} for name in names}) == tuple(range(2 * len(names)))


def test_named_tuples_keep_their_order():
    from fedasr.fusion import digits

    like = jax.eval_shape(digits.random_model, jax.random.key(0))
    assert leaf_order(like) == (0, 1, 2, 3)


# --------------------------------------------------------------- more than 2**31 in a chromosome


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**45))
def test_split_points_fit_in_31_bits(size):
    unit, points = split_unit(size), split_points(size)
    assert points < 2**31 and (points - 1) * unit < size <= points * unit
    assert unit == 1 if size < 2**31 else points >= 2**29


@pytest.mark.parametrize("count", [2**32, 40])
@pytest.mark.parametrize("begin", [0, 2**31 - 10, 2**32 - 20, 3 * 2**40 + 5])
def test_what_lies_before_a_split_point_in_64_bits(monkeypatch, count, begin):
    """`count` of 40: a leaf has several rows."""
    shape, unit = (4, 3, 11), split_unit(begin + 2**31)
    monkeypatch.setattr(module, "_COUNT", count + unit)
    place = begin + np.arange(132, dtype=np.int64).reshape(shape)
    for at in (begin - 5, begin, begin + 1, begin + 50, begin + 131, begin + 200):
        split = max(at, 0) // unit
        found = module._before(shape, begin, jnp.int32(split), unit)
        np.testing.assert_array_equal(found, place < np.int64(split) * unit)


@pytest.mark.parametrize("count", [2**32, 40])
def test_noise_beyond_32_bits_goes_on_and_does_not_repeat(monkeypatch, count):
    key, begin = jax.random.key(3), 2**32 - 66
    below = module._normal(key, begin, (66,))
    monkeypatch.setattr(module, "_COUNT", count)
    across = np.ravel(module._normal(key, begin, (4, 3, 11)))
    np.testing.assert_array_equal(across[:66], below)
    first = module._normal(key, 0, (66,))
    assert not (across[66:] == first).any()
    later = np.ravel(module._normal(key, 2**33, (2, 3, 11)))
    assert not (later == first).any() and not (later == across[66:]).any()


def test_a_large_model_is_chosen_bred_and_mutated_by_its_shapes():
    """6.4e9 parameters in one chromosome: traced whole, nothing is allocated."""
    like = {
        "embed": jax.ShapeDtypeStruct((2**17, 2**12), jnp.bfloat16),
        **{f"layer_{i}": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16) for i in range(2)},
        "vector": jax.ShapeDtypeStruct((3 * 2**29,), jnp.bfloat16),
    }
    chromosomes = leaf_chromosomes(like)
    (size,) = chromosome_sizes(like, chromosomes)
    assert size > 2**32
    evolution = methods.Evolution(population=2)

    def splits(key):
        scores, filled = jnp.ones((2, 3)), jnp.ones(2, bool)
        return methods.choose(evolution, scores, filled, key, (size,)).split[0]

    found = np.asarray(jax.vmap(splits)(jax.random.split(jax.random.key(0), 300)), np.int64)
    found *= split_unit(size)
    assert found.min() < 0.05 * size and 0.95 * size < found.max() < size

    def child(a, b, key):
        scores, filled = jnp.ones((2, 3)), jnp.ones(2, bool)
        pair = methods.choose(evolution, scores, filled, key, (size,))
        return methods.breed(evolution, a, b, pair, key, chromosomes)

    assert jax.eval_shape(child, like, like, jax.random.key(0)) == like
    assert jax.eval_shape(lambda a, b: slerp(a, b, 0.5), like, like) == like
    with pytest.raises(UserError, match="32 bits cannot count"):
        module._rows((2**33,), 0)
