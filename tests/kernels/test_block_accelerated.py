"""A block's kernels, interpreted on the CPU, compute what its operations do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr import generators
from fedasr.kernels import block_accelerated
from fedasr.kernels.low_rank import LowRank
from fedasr.models import layers, transformer

DIM, HEADS, MLP = 24, 2, 40


def params_of(seed=0, settled=False):
    """A block's parameters. settled: no unit is near the ReLU's kink, where rounding decides."""
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return {"kernel": jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)}

    def norm(around):
        vectors = around + 0.2 * rng.standard_normal(DIM), 0.2 * rng.standard_normal(DIM)
        scale, bias = (jnp.asarray(x, jnp.float32) for x in vectors)
        return {"scale": scale, "bias": bias}

    params = {
        "attention_norm": norm(1.0),
        "attention": {"qkv": matrix(DIM, 3 * DIM), "out": matrix(DIM, DIM)},
        "mlp_norm": norm(1.0),
        "mlp": {"up": matrix(DIM, MLP), "down": matrix(MLP, DIM)},
    }
    if settled:
        params["mlp_norm"] = {"scale": jnp.full(DIM, 0.1), "bias": jnp.full(DIM, 0.5)}
        signs = np.where(np.arange(MLP) % 2, 1.0, -1.0)
        up = signs * (1 + 0.2 * rng.standard_normal((DIM, MLP))) / DIM
        params["mlp"]["up"] = {"kernel": jnp.asarray(up, jnp.float32)}
    return params


def drawn(t, lengths, dtype="float32"):
    """An utterance's input and the slopes by what comes out, [b, t, d]; keys [b]."""
    rng = np.random.default_rng(1)
    x, slopes = (jnp.asarray(rng.standard_normal((len(lengths), t, DIM)), dtype) for _ in range(2))
    true = (jnp.arange(t) < jnp.asarray(lengths)[:, None])[..., None]
    root = jax.random.wrap_key_data(jnp.asarray([3, 2**31 + 9], jnp.uint32), impl=generators.HASHED)
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(len(lengths)))
    return x, jnp.where(true, slopes, 0), true, keys


def plan_of(config, training=True):
    rate = config.dropout if training else 0.0
    return block_accelerated.Plan(
        config.heads, jnp.dtype(config.dtype), rate, rate if config.branch_dropout else 0.0, True
    )


def config_of(**options):
    sizes = {"vocab": 5, "features": 8, "dim": DIM, "heads": HEADS, "mlp": MLP}
    return transformer.TransformerConfig(**sizes | {"generator": "hashed"} | options)


def both_ways(way, params, x, slopes, true):
    """A way's output, where frames are true, and its derivatives."""
    out, pull = jax.vjp(jax.jit(way), params, x)
    return jnp.where(true, out, 0), pull(slopes.astype(out.dtype))


def by_kernel(plan, lengths, keep, keys):
    def way(params, x):
        given = block_accelerated.given_of(jnp.asarray(lengths), keep, keys)
        return block_accelerated.block(plan, block_accelerated.weights_of(params), x, given)

    return way


@pytest.mark.parametrize("branch_dropout", [True, False])
@pytest.mark.parametrize(("t", "lengths", "dropout"), [(32, (32, 9), 0.3), (21, (21, 0, 5), 0.0)])
def test_values_gradients_and_dropout_are_the_modules(t, lengths, dropout, branch_dropout):
    """Whole rows of registers and not, padding utterances, and what keys draw."""
    config = config_of(dropout=dropout, branch_dropout=branch_dropout)
    x, slopes, true, keys = drawn(t, lengths)
    module = transformer.Block(config)

    def plainly(params, x):
        return module.apply({"params": params}, x, true[..., 0], keys)

    kernel = by_kernel(plan_of(config), lengths, None, layers.split_keys(keys, 4))
    params = params_of()
    expected, found = (both_ways(way, params, x, slopes, true) for way in (plainly, kernel))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    assert float(jnp.abs(expected[0] - x * true).max()) > 0.1


@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize("dropout", [0.3, 0.0])
def test_its_reference_and_layer_drop(keep, dropout):
    plan = plan_of(config_of(dropout=dropout))
    x, slopes, true, keys = drawn(32, (32, 20))
    keys = layers.split_keys(keys, 4) if dropout else None
    given = block_accelerated.given_of(jnp.asarray([32, 20]), jnp.float32(keep), keys)

    def of(function):
        return lambda params, x: function(plan, block_accelerated.weights_of(params), x, given)

    ways = of(block_accelerated.block), of(block_accelerated.reference)
    found, expected = (both_ways(way, params_of(), x, slopes, true) for way in ways)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(float(jnp.abs(b).max()), 1e-3))
    if not keep:
        np.testing.assert_array_equal(found[0], x * true)
        assert not any(jnp.abs(a).max() for a in jax.tree.leaves(found[1][0]))


@pytest.mark.parametrize("stream", ["bfloat16", "float32"])
def test_half_precision_rounds_no_more_than_others_do(stream):
    """Beside float32's: where a unit is at its kink rounding decides, so none is."""
    lengths = (32, 17)
    x, slopes, true, keys = drawn(32, lengths, stream)
    given = block_accelerated.given_of(
        jnp.asarray(lengths), jnp.float32(1), layers.split_keys(keys, 4)
    )

    def of(function, dtype, x):
        plan = plan_of(config_of(dropout=0.3, dtype=dtype))
        found = both_ways(
            lambda params, x: function(plan, block_accelerated.weights_of(params), x, given),
            params_of(settled=True), x, slopes.astype(x.dtype), true,
        )  # fmt: skip
        return [np.asarray(a, np.float32) for a in jax.tree.leaves(found)]

    wide = of(block_accelerated.reference, "float32", x.astype(jnp.float32))
    kernel = of(block_accelerated.block, "bfloat16", x)
    others = of(block_accelerated.reference, "bfloat16", x)
    for exact, a, b in zip(wide, kernel, others, strict=True):
        errors = [float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) for y in (a, b)]
        assert 1e-4 < errors[0] < 0.02 and errors[0] < 1.5 * errors[1]


def test_a_float32_stream_stays_one_where_blocks_compute_in_half_precision():
    """Branches are small here, so that their rounding does not hide that of the stream."""
    lengths = (32, 17)
    x, slopes, true, keys = drawn(32, lengths)
    given = block_accelerated.given_of(jnp.asarray(lengths), None, layers.split_keys(keys, 4))
    params = params_of()
    for name, part in (("attention", "out"), ("mlp", "down")):
        kernel = params[name][part]["kernel"]
        params[name] = params[name] | {part: {"kernel": 1e-4 * kernel}}

    def of(dtype):
        plan = plan_of(config_of(dropout=0.3, dtype=dtype))

        def way(params, x):
            return block_accelerated.block(plan, block_accelerated.weights_of(params), x, given)

        out, (_, by_x) = both_ways(way, params, x, slopes, true)
        return out, by_x

    for a, b in zip(of("bfloat16"), of("float32"), strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-4


def test_clients_side_by_side_are_each_by_itself():
    lengths = jnp.asarray([[16, 11], [3, 16], [16, 1]], jnp.int32)
    plan = plan_of(config_of(dropout=0.2))
    every = [params_of(seed) for seed in range(3)]
    x, slopes, _, keys = drawn(16, [16] * 6)
    x, slopes, keys = (a.reshape(3, 2, *a.shape[1:]) for a in (x, slopes, keys))
    keep = jnp.asarray([1.0, 0.0, 1.0])

    def both(params, x, slopes, lengths, keep, keys):
        kernel = by_kernel(plan, lengths, keep, layers.split_keys(keys, 4))
        out, pull = jax.vjp(kernel, params, x)
        return out, pull(slopes)

    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
    found = jax.jit(jax.vmap(both))(together, x, slopes, lengths, keep, keys)
    for i, params in enumerate(every):
        alone = both(params, x[i], slopes[i], lengths[i], keep[i], keys[i])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, atol=1e-5),  # noqa: B023
            found,
            alone,
        )


def test_clients_may_share_weights_and_inputs():
    """As where a part is trained: what is shared is not repeated, derivatives are each one's."""
    plan = plan_of(config_of(dropout=0.2))
    params, lengths = params_of(), (16, 9)
    x, slopes, _, keys = drawn(16, lengths)
    keep = jnp.asarray([1.0, 0.0, 1.0])
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def both(scale, keep, x):
        mine = params | {"mlp": jax.tree.map(lambda w: scale * w, params["mlp"])}
        kernel = by_kernel(plan, lengths, keep, layers.split_keys(keys, 4))
        out, pull = jax.vjp(kernel, mine, x)
        return out, pull(slopes)

    every = jnp.stack([x, 2 * x, -x])
    for axes, given in (((0, 0, None), x), ((None, 0, 0), every), ((None, None, 0), every)):
        args = [scales if axes[0] == 0 else scales[0], keep if axes[1] == 0 else keep[0], given]
        traced = jax.make_jaxpr(jax.vmap(both, in_axes=axes))(*args)
        text = str(traced)
        # One matrix for all goes in; each client has derivatives by its own.
        assert "f32[1,24,72]" in text and "f32[3,24,40]" in text
        found = jax.jit(jax.vmap(both, in_axes=axes))(*args)
        for i in range(3):
            own = [a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a[i], b, atol=2e-5),  # noqa: B023
                found,
                both(*own),
            )


@pytest.mark.parametrize("trained", [("up",), ("norms", "out"), ("qkv", "down"), ()])
def test_what_is_frozen_has_no_derivative(trained, monkeypatch):
    """As where a part is trained: the kernel neither computes it nor has room for it."""
    lengths, plan = (16, 9), plan_of(config_of(dropout=0.2))
    x, slopes, _, keys = drawn(16, lengths)
    weights = block_accelerated.weights_of(params_of())
    given = block_accelerated.given_of(jnp.asarray(lengths), None, layers.split_keys(keys, 4))
    asked, real = [], block_accelerated._call  # names of weights, by kernels backwards

    def call(*args):
        if args[-1] is not None:
            places = zip(weights._fields, args[-1], strict=True)
            asked.append({name for name, shape in places if shape is not None})
        return real(*args)

    monkeypatch.setattr(block_accelerated, "_call", call)

    def of(names):
        def total(part, x):
            out = block_accelerated.block(plan, weights._replace(**part), x, given)
            return jnp.sum(out * slopes)

        def of_client(scale):
            part = {name: scale * getattr(weights, name) for name in names}
            return jax.grad(total, argnums=(0, 1))(part, x)

        return jax.jit(jax.vmap(of_client))(jnp.asarray([1.0, -1.0]))

    every, by_x = of(weights._fields)
    assert asked and all(names == {*weights._fields} for names in asked)
    asked.clear()
    found, found_by_x = of(trained)
    assert asked and all(names == {*trained} for names in asked)
    for name, derivative in found.items():  # of the first client, who has the same weights
        np.testing.assert_allclose(derivative[0], every[name][0], atol=1e-5)
        assert float(jnp.abs(derivative[1] - derivative[0]).max()) > 0.01
    np.testing.assert_allclose(found_by_x[0], by_x[0], atol=1e-5)


def test_which_blocks_have_one():
    plan = plan_of(config_of())
    assert block_accelerated.fits("tpu", plan, 96, 144, 576)
    assert not block_accelerated.fits("gpu", plan, 96, 144, 576)
    assert not block_accelerated.fits("tpu", plan, 513, 144, 576)
    assert not block_accelerated.fits("tpu", plan, 96, 768, 3072)  # matrices of 28 MB
    assert not block_accelerated.fits("tpu", plan._replace(dtype="float16"), 96, 144, 576)
    assert not block_accelerated.fits("tpu", plan._replace(heads=24), 96, 144, 576)
    params = params_of()
    assert block_accelerated.weights_of(params) is not None
    assert block_accelerated.weights_of(params | {"adapter": {}}) is None
    kernel = LowRank(*(jnp.zeros((2, 2)) for _ in range(3)), 1.0)
    low = {"up": {"kernel": kernel}, "down": params["mlp"]["down"]}
    assert block_accelerated.weights_of(params | {"mlp": low}) is None
    biased = {"up": params["mlp"]["up"] | {"bias": jnp.zeros(MLP)}, "down": params["mlp"]["down"]}
    assert block_accelerated.weights_of(params | {"mlp": biased}) is None
