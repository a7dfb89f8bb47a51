"""Updates whose blocks are stacked are clipped as the same updates block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr import stacks
from fedasr.data.batching import Chunk
from fedasr.federated.client import ClientMetrics
from fedasr.federated.cohort import client_mesh, make_cohort
from fedasr.privacy import clipping

BLOCKS = 11  # so that names are not in the order of numbers
RULES = {
    "layers": clipping.clip_by_layer(1.0, "dim"),
    "normalised": clipping.clip_by_layer(1.0, "uniform", normalise=True),
    "blocks": clipping.clip_by_layer(1.0, layers=lambda name: name.split("/")[0]),
    "nothing of a layer": clipping.clip_by_layer(1.0, lambda sizes: [0.0, *range(1, len(sizes))]),
    "global": clipping.clip_global(1.0),
    "none": clipping.no_clip(),
}


def update(seed, exponents=(0, 0)):
    """Norms of layers lie between 10^exponents."""
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        size = 10.0 ** rng.uniform(*exponents)
        return (rng.standard_normal(shape) * size / np.sqrt(np.prod(shape))).astype(np.float32)

    tree = {f"block_{i}": {"a": drawn(3, 4), "norm": {"b": drawn(4)}} for i in range(BLOCKS)}
    return tree | {"final": drawn(5), "front": {"c": drawn(2, 3)}}


def norm(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return float(np.sqrt(np.sum(np.concatenate(leaves) ** 2)))


@functools.cache
def clip(rule):
    rule = RULES[rule]
    return jax.jit(lambda tree: rule.update(tree, rule.init(tree)))


def both(rule, tree):
    """Clipped as it is, and stacked."""
    out, state = clip(rule)(stacks.stack(tree))
    return clip(rule)(tree), (stacks.unstack(out), state)


def test_stacking_is_undone():
    tree = jax.tree.map(jnp.asarray, update(0))
    assert stacks.can_stack(tree) and not stacks.can_stack(tree | {"block_10": {"a": np.ones(1)}})
    assert not stacks.can_stack({"final": tree["final"]})
    assert not stacks.can_stack(stacks.stack(tree))
    back = stacks.unstack(stacks.stack(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize("rule", RULES)
def test_names_states_and_updates_are_the_same(rule):
    assert clipping.layer_names(stacks.stack(update(0))) == clipping.layer_names(update(0))
    for seed, exponents in enumerate([(-3, 1), (-36, -34), (26, 28), (-20, 20)]):
        (out, state), (found, of_stack) = both(rule, update(seed, exponents))
        np.testing.assert_allclose(of_stack.norms, state.norms, rtol=2e-6)
        np.testing.assert_array_equal(of_stack.clipped, state.clipped)
        assert bool(of_stack.finite) and bool(state.finite)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6), found, out)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_zero(rule, bad):
    tree = update(3)
    tree["block_9"]["a"][1, 1] = bad
    found, state = clip(rule)(stacks.stack(tree))
    assert not state.finite and all(not np.any(x) for x in jax.tree.leaves(found))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.tuples(st.floats(-37, 37), st.floats(-37, 37)).map(sorted))
def test_no_update_is_longer_than_its_bound_and_clipping_twice_is_clipping_once(seed, exponents):
    tree = stacks.stack(update(seed, exponents))
    for rule in ("layers", "blocks", "global"):
        found, _ = clip(rule)(tree)
        assert norm(found) <= 1 + 1e-6
        again, _ = clip(rule)(found)
        jax.tree.map(np.testing.assert_array_equal, again, found)


@functools.cache
def cohort(stacked):
    """Sums of updates that the examples say, through the real clipping."""

    def client_update(params, batches, num_steps, key, max_steps=None, round=0):
        del num_steps, key, max_steps, round
        assert stacks.is_stacked(params) == stacked
        delta = jax.tree.map(lambda p: p * batches["factor"][0, 0], params)
        return delta, ClientMetrics(jnp.float32(0), {})

    clip = RULES["layers"]
    return make_cohort(client_update, clip, client_mesh(jax.devices()[:1]), stacked=stacked)


def total(stacked, factors):
    count, parts = len(factors), cohort(stacked)
    params = jax.tree.map(jnp.asarray, update(5, (-2, 1)))
    chunk = Chunk(
        batches={"factor": jnp.asarray(factors, jnp.float32).reshape(count, 1, 1)},
        num_steps=jnp.ones(count, jnp.int32),
        weight=jnp.ones(count),
        user=jnp.arange(count, dtype=jnp.int32),
        local=None,
        resident=None,
    )
    sums = parts.zeros(params, chunk)
    return parts.total(parts.add(sums, params, chunk, jax.random.key(0), np.int32(0)))


def test_a_user_moves_the_cohorts_sum_by_no_more_than_without():
    """Huge, tiny, not finite and usual updates, with blocks stacked within the program."""
    factors = [1e30, 3.0, 1e-30, np.nan, -1.0]
    plain, found = total(False, factors), total(True, factors)
    assert jax.tree.structure(plain.delta) == jax.tree.structure(found.delta)
    assert int(found.invalid) == int(plain.invalid) == 1
    np.testing.assert_allclose(found.norms, plain.norms, rtol=1e-5)
    np.testing.assert_array_equal(found.clipped, plain.clipped)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found.delta,
        plain.delta,
    )
    for left_out in range(len(factors)):
        rest = [0.0 if i == left_out else x for i, x in enumerate(factors)]
        moved = jax.tree.map(jnp.subtract, found.delta, total(True, rest).delta)
        assert float(optax.global_norm(moved)) <= 1 + 1e-5
