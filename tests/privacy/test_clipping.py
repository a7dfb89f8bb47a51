import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.errors import UserError
from fedasr.privacy import clipping

SHAPES = {"encoder": {"kernel": (3, 5), "bias": (5,)}, "head": {"kernel": (7, 2), "scale": ()}}
NAMES = ["encoder/bias", "encoder/kernel", "head/kernel", "head/scale"]
CLIP_NORMS = (1e-8, 1.0, 300.0)
SLACK = 1 + 1e-6


def by_module(path):
    return path.split("/")[0]


def skewed(sizes):
    return [0.0, *range(1, len(sizes))]


RULES = {
    "uniform": dict(budget="uniform"),
    "dim": dict(budget="dim"),
    "callable": dict(budget=skewed),
    "groups": dict(budget="dim", layers=by_module),
    "global": None,
    "none": None,
}


def transform(rule, clip_norm):
    if rule == "none":
        return clipping.no_clip()
    if rule == "global":
        return clipping.clip_global(clip_norm)
    return clipping.clip_by_layer(clip_norm, **RULES[rule])


@functools.cache
def clip(rule, clip_norm):
    """Jitted tree -> (clipped, state), compiled once per rule and clip norm (and dtype)."""
    rule = transform(rule, clip_norm)
    return jax.jit(lambda tree: rule.update(tree, rule.init(tree)))


def tree_of(values, dtype=jnp.float32):
    """A tree of SHAPES filled from a flat array of 35 numbers."""
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    ends = np.cumsum([math.prod(shape) for shape in leaves])[:-1]
    parts = np.split(np.asarray(values, np.float32), ends)
    return treedef.unflatten(
        [jnp.asarray(p.reshape(s)).astype(dtype) for p, s in zip(parts, leaves, strict=True)]
    )


def norm64(*leaves):
    return math.sqrt(math.fsum(np.sum(np.asarray(x).astype(np.float64) ** 2) for x in leaves))


def grouped(tree, layers=None):
    """Leaves by layer, in the order of layer_names, by another route than the implementation's."""
    groups = {}
    for module in sorted(tree):
        for name in sorted(tree[module]):
            path = f"{module}/{name}"
            groups.setdefault(layers(path) if layers else path, []).append(tree[module][name])
    return groups


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


finite_floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-10, 10, width=32),
    st.sampled_from([0.0, -0.0, 1e38, -3e38, 1e-38, 1e-45, 1e19, 1e-19]),
)
updates = st.one_of(
    st.lists(finite_floats, min_size=35, max_size=35),
    st.builds(
        lambda seed, exponent: (
            np.random.default_rng(seed).normal(size=35) * 10.0**exponent
        ).astype(np.float32),
        st.integers(0, 2**32 - 1),
        st.integers(-44, 37),
    ),
)
rules = st.sampled_from(["uniform", "dim", "callable", "groups", "global"])
clip_norms = st.sampled_from(CLIP_NORMS)


@pytest.mark.parametrize("clip_norm", CLIP_NORMS)
@pytest.mark.parametrize("budget", ["uniform", "dim", skewed, lambda sizes: np.sqrt(sizes)])
@pytest.mark.parametrize("layers", [None, by_module])
def test_squared_bounds_sum_to_squared_clip_norm(clip_norm, budget, layers):
    bounds = clipping.layer_bounds(tree_of(np.zeros(35)), clip_norm, budget, layers)
    assert len(bounds) == (4 if layers is None else 2)
    np.testing.assert_allclose(np.sum(bounds**2), clip_norm**2, rtol=1e-14)


def test_bounds_follow_the_paper():
    params = tree_of(np.zeros(35))
    np.testing.assert_allclose(clipping.layer_bounds(params, 6.0, "uniform"), [3.0] * 4)
    sizes = np.array([5, 15, 14, 1])
    np.testing.assert_allclose(
        clipping.layer_bounds(params, 6.0, "dim"), 6 * np.sqrt(sizes / sizes.sum())
    )
    np.testing.assert_allclose(
        clipping.layer_bounds(params, 6.0, skewed), 6 * np.sqrt(np.array([0, 1, 2, 3]) / 6)
    )
    np.testing.assert_allclose(
        clipping.layer_bounds(params, 6.0, "dim", by_module), 6 * np.sqrt([20 / 35, 15 / 35])
    )


def test_layer_names():
    params = tree_of(np.zeros(35))
    assert clipping.layer_names(params) == NAMES
    assert clipping.layer_names(params, by_module) == ["encoder", "head"]


@settings(deadline=None, max_examples=100)
@given(values=updates, rule=rules, clip_norm=clip_norms)
def test_norms_are_within_their_bounds_and_clipping_is_idempotent(values, rule, clip_norm):
    tree = tree_of(values)
    clipped, state = clip(rule, clip_norm)(tree)
    assert state.finite
    assert norm64(*jax.tree.leaves(clipped)) <= clip_norm * SLACK
    if rule != "global":
        spec = RULES[rule]
        bounds = clipping.layer_bounds(tree, clip_norm, **spec)
        groups = grouped(clipped, spec.get("layers"))
        for bound, leaves in zip(bounds, groups.values(), strict=True):
            assert norm64(*leaves) <= bound * SLACK
    again, _ = clip(rule, clip_norm)(clipped)
    assert bits(again) == bits(clipped)


@settings(deadline=None, max_examples=100)
@given(values=updates, rule=rules, clip_norm=clip_norms)
def test_equals_a_float64_oracle(values, rule, clip_norm):
    tree = tree_of(values)
    clipped, state = clip(rule, clip_norm)(tree)
    spec = RULES[rule] or {}
    groups = grouped(tree, spec.get("layers"))
    norms = [norm64(*leaves) for leaves in groups.values()]
    if rule == "global":
        total = norm64(*norms)
        scales = [clip_norm / max(clip_norm, total)] * len(norms)
    else:
        bounds = clipping.layer_bounds(tree, clip_norm, **spec)
        scales = [
            bound / max(bound, norm) if bound > 0 else 0.0
            for bound, norm in zip(bounds, norms, strict=True)
        ]
    np.testing.assert_allclose(
        state.norms, np.minimum(norms, np.finfo(np.float32).max), rtol=1e-5, atol=1e-37
    )
    for scale, norm, flag in zip(scales, norms, state.clipped, strict=True):
        if abs(scale - 1) > 1e-5 and norm > 1e-37:
            assert flag == (scale < 1)
    got = grouped(clipped, spec.get("layers"))
    for scale, norm, name in zip(scales, norms, groups, strict=True):
        # What is vastly smaller than the rest of what it is scaled with may underflow.
        atol = max(1e-37, 1e-12 * scale * (total if rule == "global" else norm))
        for before, after in zip(groups[name], got[name], strict=True):
            expected = np.asarray(before, np.float64) * scale
            np.testing.assert_allclose(np.asarray(after), expected, rtol=1e-5, atol=atol)


@settings(deadline=None, max_examples=60)
@given(
    values=updates,
    rule=st.sampled_from(sorted(RULES)),
    where=st.integers(0, 34),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_a_non_finite_update_becomes_zero_and_is_flagged(values, rule, where, bad):
    values = np.array(values, np.float32)
    values[where] = bad
    clipped, state = clip(rule, 1.0)(tree_of(values))
    assert not state.finite
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(clipped))
    assert not np.any(state.norms) and not np.any(state.clipped)


@settings(deadline=None, max_examples=100)
@given(
    values=updates,
    rule=st.sampled_from(["dim", "global"]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
)
def test_low_precision_rounds_within_the_bound(values, rule, dtype):
    tree = tree_of(np.clip(values, -6e4, 6e4), dtype)
    clipped, state = clip(rule, 1.0)(tree)
    assert state.finite
    assert all(x.dtype == dtype for x in jax.tree.leaves(clipped))
    assert norm64(*jax.tree.leaves(clipped)) <= SLACK
    if rule == "dim":
        bounds = clipping.layer_bounds(tree, 1.0, "dim")
        for bound, leaves in zip(bounds, grouped(clipped).values(), strict=True):
            assert norm64(*leaves) <= bound * SLACK
    again, _ = clip(rule, 1.0)(clipped)
    assert bits(again) == bits(clipped)
    # One unit in the last place, not more, is lost by rounding toward zero.
    exact, _ = clip(rule, 1.0)(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
    step = float(jnp.finfo(dtype).eps)
    for low, high in zip(jax.tree.leaves(clipped), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(
            np.asarray(low, np.float64), np.asarray(high, np.float64), rtol=step, atol=6e-8
        )


@settings(deadline=None, max_examples=40)
@given(values=updates, rule=rules)
def test_what_is_within_bounds_is_untouched_bit_for_bit(values, rule):
    values = np.asarray(values, np.float32)
    if rule == "callable":  # its first layer has no budget at all
        values[:5] = 0
    values = values / np.float64(1e3 * max(1.0, float(np.abs(values).max())))
    tree = tree_of(values)
    clipped, state = clip(rule, 1.0)(tree)
    assert bits(clipped) == bits(tree)
    flags = state.clipped[1:] if rule == "callable" else state.clipped
    assert not np.any(flags)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_vmap_equals_one_by_one(rule):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 35)).astype(np.float32) * np.array([[1e-3], [1], [1e30], [0], [5]])
    rows[4, 3] = np.nan
    single = [clip(rule, 1.0)(tree_of(row)) for row in rows]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *[tree_of(row) for row in rows])
    t = transform(rule, 1.0)
    batched = jax.jit(jax.vmap(lambda u: t.update(u, t.init(u))))(stacked)
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *single)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), batched, expected)
    np.testing.assert_array_equal(batched[1].finite, [True] * 4 + [False])


@pytest.mark.parametrize("rule", ["dim", "global"])
@pytest.mark.parametrize("kind", ["normal", "constant", "skewed"])
def test_the_bound_holds_for_millions_of_elements(rule, kind):
    """The float32 sums of XLA must err by less than the margin that clipping keeps."""
    rng = np.random.default_rng(1)
    size = 2**22
    values = {
        "normal": lambda: rng.normal(size=size),
        "constant": lambda: np.full(size, np.sqrt(1.9999999)),
        "skewed": lambda: np.exp(2 * rng.normal(size=size)),
    }[kind]().astype(np.float32)
    tree = {"a": values.reshape(2048, 2048), "b": values[: 10**6 + 1]}
    clipped, state = clip(rule, 1.0)(tree)
    total = norm64(*jax.tree.leaves(clipped))
    assert 1 - 1e-5 <= total <= SLACK
    for name, norm in zip("ab", state.norms, strict=True):
        assert abs(float(norm) / norm64(tree[name]) - 1) < 5e-7
    again, _ = clip(rule, 1.0)(clipped)
    assert bits(again) == bits(clipped)


def test_global_agrees_with_optax_where_optax_is_safe():
    tree = tree_of(np.random.default_rng(0).normal(size=35))
    clipped, _ = clip("global", 1.0)(tree)
    expected, _ = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, expected)


def test_diagnostics_of_the_global_clip_are_per_layer():
    tree = tree_of(np.r_[np.full(5, 3.0), np.zeros(30)])
    state = clip("global", 1.0)(tree)[1]
    np.testing.assert_allclose(state.norms, [3 * math.sqrt(5), 0, 0, 0], rtol=1e-6)
    assert np.all(state.clipped)


def test_init_gives_zeros_of_the_same_structure_as_update():
    tree = tree_of(np.ones(35))
    for rule in RULES:
        t = transform(rule, 1.0)
        initial, updated = t.init(tree), clip(rule, 1.0)(tree)[1]
        assert not any(np.any(x) for x in initial)
        assert [(x.shape, x.dtype) for x in initial] == [(x.shape, x.dtype) for x in updated]


def test_no_clip_leaves_everything_finite_alone():
    tree = tree_of(np.linspace(-3e38, 3e38, 35))
    clipped, state = clip("none", 1.0)(tree)
    assert bits(clipped) == bits(tree)
    assert state.finite and not np.any(state.clipped)


def test_composes_in_an_optax_chain():
    t = optax.chain(clipping.clip_by_layer(1.0), optax.scale(2.0))
    tree = tree_of(np.full(35, 100.0))
    out, state = t.update(tree, t.init(tree))
    np.testing.assert_allclose(norm64(*jax.tree.leaves(out)), 2.0, rtol=1e-5)
    assert np.all(state[0].clipped)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan, 1e30])
def test_an_unusable_clip_norm_is_a_user_error(clip_norm):
    with pytest.raises(UserError, match="clip_norm"):
        clipping.clip_by_layer(clip_norm)
    with pytest.raises(UserError, match="clip_norm"):
        clipping.clip_global(clip_norm)


def test_an_unusable_budget_is_a_user_error():
    params = tree_of(np.zeros(35))
    with pytest.raises(UserError, match="budget"):
        clipping.clip_by_layer(1.0, "unknown")
    for weights in ([1.0], [-1.0, 1, 1, 1], [0.0] * 4, [math.nan, 1, 1, 1], [1e-100, 1, 1, 1]):
        with pytest.raises(UserError, match="budget"):
            clipping.layer_bounds(params, 1.0, lambda sizes, weights=weights: weights)


def test_only_floating_point_updates_are_accepted():
    with pytest.raises(UserError, match="'steps' is int32"):
        clipping.clip_global(1.0).init({"steps": jnp.zeros(3, jnp.int32)})
    with pytest.raises(UserError, match="no arrays"):
        clipping.clip_global(1.0).init({})


@given(values=updates, budget=st.sampled_from(["uniform", "dim"]))
@settings(deadline=None, max_examples=100)
def test_normalising_is_all_or_nothing(values, budget):
    tree = tree_of(values)
    clipped, state = normalised(budget)(tree)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    norms = np.array([np.sqrt((x**2).sum()) for x in leaves])
    after = np.array(
        [np.sqrt((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(clipped)]
    )
    assert np.sqrt((after**2).sum()) <= SLACK
    if np.sqrt((norms**2).sum()) <= 1 - 1e-6:
        assert not np.any(state.clipped)
        jax.tree.map(np.testing.assert_array_equal, clipped, tree)
    elif np.sqrt((norms**2).sum()) >= 1 + 1e-6:
        assert np.all(state.clipped)
        bounds = clipping.layer_bounds(tree, 1.0, budget)
        # Small layers are scaled up to their bound; what is nothing (to float32) stays nothing.
        something = norms > 1e-30
        np.testing.assert_allclose(after[something], bounds[something], rtol=1e-5)
        assert not after[norms == 0].any()


@functools.cache
def normalised(budget):
    rule = clipping.clip_by_layer(1.0, budget, normalise=True)
    return jax.jit(lambda tree: rule.update(tree, rule.init(tree)))
