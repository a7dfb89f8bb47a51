import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.compression.partial import Subset, deal, partial_training
from fedasr.errors import UserError
from fedasr.federated.client import local_training
from fedasr.federated.subset import merge, select

LAYERS, WIDTH, STEPS, BATCH = 6, 8, 3, 4


def parameters():
    rng = np.random.default_rng(0)
    return {
        f"block_{i}": {
            "bias": np.zeros(WIDTH, np.float32),
            "kernel": (rng.normal(size=(WIDTH, WIDTH)) / 3).astype(np.float32),
        }
        for i in range(LAYERS)
    }


def network(params, batch, key):
    del key
    x = batch["x"]
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"block_{i}"]["kernel"] + params[f"block_{i}"]["bias"])
    return jnp.mean((x - batch["y"]) ** 2), {"examples": batch["mask"].sum()}


def make_update(loss):
    return local_training(loss, optax.adamw(0.1, weight_decay=0.1), grad_clip=0.1)


def data():
    rng = np.random.default_rng(1)
    shape = (STEPS, BATCH, WIDTH)
    return {
        "x": rng.normal(size=shape).astype(np.float32),
        "y": rng.normal(size=shape).astype(np.float32),
        "mask": np.ones(shape[:2], bool),
    }


@functools.cache
def compiled(subset):
    return jax.jit(partial_training(make_update, network, subset))


def train(subset, user=0, round=0):
    steps, key = np.int32(STEPS), jax.random.key(user)
    return compiled(subset)(parameters(), data(), steps, key, steps, np.int32(round))[0]


def by_hand(trained):
    """The same steps with gradients of everything, and an optimiser that sees some of them."""
    start = parameters()
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1, weight_decay=0.1))
    params = start
    state = optimizer.init(select(params, trained))
    for i in range(STEPS):
        batch = jax.tree.map(lambda x: x[i], data())  # noqa: B023
        gradients = jax.grad(lambda p: network(p, batch, None)[0])(params)  # noqa: B023
        updates, state = optimizer.update(
            select(gradients, trained), state, select(params, trained)
        )
        zeros = jax.tree.map(jnp.zeros_like, params)
        params = optax.apply_updates(params, merge(updates, zeros, trained))
    return jax.tree.map(lambda a, b: a - b, start, params)


def changed(delta):
    return [bool(np.any(leaf)) for leaf in jax.tree.leaves(delta)]


def agree(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_keep_and_merge_are_inverse():
    params = parameters()
    kept = [i % 3 == 0 for i in range(2 * LAYERS)]
    part = select(params, kept)
    assert len(jax.tree.leaves(part)) == sum(kept)
    paths = {jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(part)}
    assert paths < {jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)}
    doubled = merge(jax.tree.map(lambda x: 2 * x + 1, part), params, kept)
    for a, b, yes in zip(*map(jax.tree.leaves, (doubled, params)), kept, strict=True):
        np.testing.assert_array_equal(a, 2 * b + 1 if yes else b)
    assert select(params, None) is params and merge(part, params, None) is part


def test_fixed_patterns_train_what_they_name():
    subset = Subset("fixed", (r"block_[45]/", "block_0/bias"))
    trained = subset.trained(parameters())
    assert trained == [True] + 7 * [False] + 4 * [True]
    assert subset.uploaded(parameters()) == [float(x) for x in trained]
    delta = train(subset)
    assert len(jax.tree.leaves(delta)) == sum(trained)
    agree(delta, select(by_hand(trained), trained))


def test_frozen_variables_have_no_backward_pass():
    """XLA's own count of the operations: gradients of the lower layers are not computed at all."""

    def flops(subset):
        update = partial_training(make_update, network, subset)
        one = jax.tree.map(lambda x: x[:1], data())
        # Bounds that are no constants would leave XLA no count of the loop's turns.
        program = jax.jit(lambda p, b, k: update(p, b, 1, k, 1))
        return (
            program.lower(parameters(), one, jax.random.key(0)).compile().cost_analysis()["flops"]
        )

    product = 2 * BATCH * WIDTH * WIDTH
    everything = flops(Subset("fixed", (".",)))
    last = flops(Subset("fixed", (f"block_{LAYERS - 1}/",)))
    # 6 products forward, 5 + 6 backward against 6 and 1; optimisers come on top.
    assert everything > 17 * product
    assert everything - last > 9 * product
    assert last < 12 * product


def test_a_round_trains_one_group_for_everybody():
    subset = Subset("round", groups=3, seed=5)
    groups = deal(parameters(), 3)
    assert [g for g in groups if g is None] == [None] * LAYERS  # biases
    assert sorted(g for g in groups if g is not None) == [0, 0, 1, 1, 2, 2]
    seen = set()
    for round in range(12):
        found = [changed(train(subset, user, round)) for user in (1, 2)]
        assert found[0] == found[1]
        (group,) = {g for g, yes in zip(groups, found[0], strict=True) if yes and g is not None}
        assert found[0] == [g in (None, group) for g in groups]
        seen.add(group)
    assert seen == {0, 1, 2}
    trained = [g in (None, group) for g in groups]
    delta = train(subset, 0, round)
    agree(select(delta, trained), select(by_hand(trained), trained))
    assert subset.uploaded(parameters()) == [1 / 3 if g is not None else 1.0 for g in groups]


def test_only_one_group_is_computed_under_vmap():
    update = partial_training(make_update, network, Subset("round", groups=3))

    def clients(params, keys, round):
        batches = jax.tree.map(jnp.asarray, data())
        return jax.vmap(lambda k: update(params, batches, STEPS, k, STEPS, round)[0])(keys)

    keys = jax.random.split(jax.random.key(0), 2)
    text = jax.jit(clients).lower(parameters(), keys, np.int32(0)).as_text()
    assert text.count("stablehlo.case") == 1


def test_users_train_shares_of_their_own():
    subset = Subset("user", share=1 / 3)
    masks = [changed(train(subset, user)) for user in range(6)]
    for mask in masks:
        assert sum(mask[1::2]) == 2  # of six kernels
        assert all(mask[0::2])  # all biases
    assert len({tuple(mask) for mask in masks}) > 2
    assert masks[0] == changed(train(subset, 0))
    agree(
        select(train(subset, 1), masks[1]),
        select(by_hand(masks[1]), masks[1]),
    )
    assert subset.uploaded(parameters()) == [1.0, 1 / 3] * LAYERS


def test_groups_are_of_about_equal_size():
    params = {f"w{i}": np.zeros((i + 1, 10)) for i in range(10)} | {"b": np.zeros(3)}
    groups = dict(zip(sorted(params), deal(params, 3), strict=True))
    assert groups.pop("b") is None
    sizes = [sum(params[n].size for n, g in groups.items() if g == group) for group in range(3)]
    assert sum(sizes) == 550 and max(sizes) - min(sizes) <= 20


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "some"}, "choose 'fixed', 'round' or 'user'"),
        ({"mode": "fixed", "patterns": ("(",)}, "partial.patterns"),
        ({"groups": 0}, "at least 1"),
        ({"share": 0.0}, "above 0"),
        ({"share": 1.1}, "at most 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Subset("user"), **change)


def test_patterns_must_match():
    with pytest.raises(UserError, match="'blok' matches none of"):
        Subset("fixed", ("block_0", "blok")).trained(parameters())
    with pytest.raises(UserError, match="nothing would be trained"):
        Subset("fixed").trained(parameters())
