import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedasr.compression import online
from fedasr.compression.formats import FloatFormat, decode
from fedasr.compression.transport import transport_bytes
from fedasr.data.batching import Chunk
from fedasr.errors import UserError
from fedasr.federated.client import local_training
from fedasr.federated.cohort import client_mesh, make_cohort
from fedasr.privacy.clipping import clip_by_layer

S1E3M7, S1E2M3, S1E4M3 = FloatFormat(3, 7), FloatFormat(2, 3), FloatFormat(4, 3)
SHAPE = (8, 6)
NAMES = [f"block_{i}" for i in range(2)]


def bits(x):
    return np.asarray(x).tobytes()


@functools.cache
def jitted(fmt, align):
    def function(value):
        stored = online.compress_variable(value, fmt, align=align)
        return stored, decode(stored.codes, fmt), online.decompress_variable(stored)

    return jax.jit(function)


def both(value, fmt, align=False):
    """What is stored of a variable, the numbers of its codes, and what comes back."""
    return jax.device_get(jitted(fmt, align)(np.asarray(value, np.float32)))


def normal(seed, shape=SHAPE, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def squares(x):
    return np.sum(np.asarray(x, np.float64) ** 2)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("fmt", [S1E3M7, S1E2M3], ids=str)
def test_scale_and_bias_are_the_least_squares_fit(fmt, align):
    for seed, scale, shift in ((0, 1.0, 0.0), (1, 0.3, 0.2), (2, 4.0, -1.0)):
        value = normal(seed, scale=scale) + np.float32(shift)
        stored, rounded, back = both(value, fmt, align)
        design = np.stack([rounded.ravel().astype(np.float64), np.ones(value.size)], axis=1)
        (slope, offset), *_ = np.linalg.lstsq(design, value.ravel().astype(np.float64))
        np.testing.assert_allclose(stored.scale, slope, rtol=1e-5)
        np.testing.assert_allclose(stored.bias, offset, atol=1e-6 * np.abs(value).max())
        np.testing.assert_allclose(back, slope * rounded + offset, atol=1e-5)
        if not align:  # the paper's: codes of the values themselves
            assert squares(back - value) < squares(rounded - value)


@given(hnp.arrays(np.float32, SHAPE, elements=st.floats(-50, 50, width=32)))
@settings(deadline=None, max_examples=60)
def test_the_fit_is_never_worse_than_rounding(value):
    _, rounded, back = both(value, S1E3M7)
    slack = value.size * (4e-7 * max(1.0, np.abs(value).max())) ** 2
    assert squares(back - value) <= squares(rounded - value) * (1 + 1e-5) + slack
    assert np.all(np.isfinite(back))


@pytest.mark.parametrize("align", [False, True])
def test_numbers_of_the_format_come_back_exactly(align):
    codes = np.arange(2**11, dtype=np.uint16).reshape(64, 32)
    value = np.asarray(decode(codes, S1E3M7))
    stored, _, back = both(value, S1E3M7, align)
    np.testing.assert_array_equal(back, value)
    assert stored.codes.dtype == np.uint16 and stored.bias == 0
    if align:  # and so do their multiples by powers of two, large or small
        for factor in (2.0**-20, 2.0**-3, 2.0**40):
            np.testing.assert_array_equal(both(value * factor, S1E3M7, align)[2], value * factor)
    else:
        np.testing.assert_array_equal(stored.codes[value != 0], codes[value != 0])
        assert stored.scale == 1


@given(
    codes=hnp.arrays(np.int64, SHAPE, elements=st.integers(0, 15), unique=False),
    slope=st.floats(0.985, 1.015),
    offset=st.floats(-0.01, 0.01),
)
@settings(deadline=None, max_examples=40)
def test_affine_images_of_numbers_come_back(codes, slope, offset):
    # Images of multiples of 1/8 that are near enough to round to them.
    numbers = codes.astype(np.float64) / 8
    value = (slope * numbers + offset).astype(np.float32)
    stored, rounded, back = both(value, S1E2M3)
    np.testing.assert_array_equal(rounded, numbers)
    np.testing.assert_allclose(back, value, atol=1e-6)
    if len(np.unique(codes)) > 1:
        np.testing.assert_allclose([stored.scale, stored.bias], [slope, offset], atol=1e-5)


def test_two_values_come_back_from_any_format():
    value = np.where(normal(0) > 0.5, np.float32(0.7431), np.float32(-3.21))
    np.testing.assert_allclose(both(value, S1E2M3)[2], value, rtol=1e-6)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("fmt", [S1E3M7, S1E2M3], ids=str)
def test_constants_come_back_exactly(fmt, align):
    for constant in (0.0, 1.0, -0.3, 1e-5, -1e-30, 1.9999, 700.1, 3e20, 1e-40):
        value = np.full(SHAPE, constant, np.float32)
        _, _, back = both(value, fmt, align)
        # Subnormal float32 numbers may be flushed to zero.
        np.testing.assert_allclose(back, value, rtol=0, atol=1.2e-38)


@pytest.mark.parametrize("align", [False, True])
def test_extreme_values_stay_finite_and_bad_ones_show(align):
    for scale in (1e-38, 1e-20, 1e10, 1e37):
        value = normal(1, scale=scale)
        _, _, back = both(value, S1E3M7, align)
        assert np.all(np.isfinite(back))
        if align and scale > 1e-38:
            assert squares((back - value) / scale) < 1e-4 * squares(value / scale)
    for bad in (np.nan, np.inf, -np.inf):
        value = normal(2)
        value[3, 2] = bad
        assert not np.any(np.isfinite(both(value, S1E3M7, align)[2]))


def test_alignment_makes_the_size_of_values_irrelevant():
    value = normal(3, (64, 32))
    errors = {}
    for scale in (1.0, 2.0**-5, 2.0**-10):
        for align in (False, True):
            back = both(scale * value, S1E3M7, align)[2]
            errors[scale, align] = np.sqrt(squares(back - scale * value) / squares(scale * value))
    assert errors[1.0, True] == errors[2.0**-5, True] == errors[2.0**-10, True] < 0.003
    assert errors[2.0**-5, False] > 5 * errors[2.0**-5, True]
    assert errors[2.0**-10, False] > 0.3


def parameters(seed=0):
    """Two blocks with a matrix, a bias and a step count."""
    return {
        name: {
            "kernel": normal([seed, i]),
            "bias": normal([seed, i, 1], (6,)),
            "count": np.int32(i),
        }
        for i, name in enumerate(NAMES)
    }


choose = jax.jit(online.choose, static_argnums=(1, 2))


@functools.cache
def compressor(share=0.5, fmt=S1E3M7):
    return jax.jit(lambda params, key: online.compress_params(params, fmt, key, share))


def changed(before, after):
    return [bits(before[n]["kernel"]) != bits(after[n]["kernel"]) for n in NAMES]


def test_only_chosen_matrices_change():
    params = parameters()
    params["block_1"]["bias"][0] = -0.0
    params["block_1"]["kernel"][0, 0] = 1e-41  # would not survive arithmetic
    # In this round it is the other block's turn.
    key = jax.random.key(next(i for i in range(99) if choose(jax.random.key(i), 2, 0.5)[0]))
    out = compressor()(params, key)
    assert changed(params, out) == [True, False]
    for name, hit in zip(NAMES, changed(params, out), strict=True):
        assert bits(out[name]["bias"]) == bits(params[name]["bias"])
        assert bits(out[name]["count"]) == bits(params[name]["count"])
        kernel = params[name]["kernel"]
        expected = both(kernel, S1E3M7)[2] if hit else kernel
        np.testing.assert_allclose(out[name]["kernel"], expected, rtol=3e-7, atol=1e-7)
    assert choose(key, 2, 1.0).all() and not choose(key, 2, 0.0).any()


def test_the_subset_follows_the_user_and_the_round():
    kernels = {f"w{i}": np.full((2, 2), 0.3 + i, np.float32) for i in range(12)}

    # What a client is given, its key and what it was told.
    def probe(params, batches, num_steps, key, max_steps=None, round=0):
        return params, (jax.random.key_data(key), batches, num_steps, max_steps, round)

    def rounded(value, fmt, align):
        del fmt, align
        return value + 1

    with pytest.MonkeyPatch.context() as patch:  # to see at a glance what was compressed
        patch.setattr(online, "compress_variable", rounded)
        patch.setattr(online, "decompress_variable", lambda value: value)
        update = jax.jit(online.as_client_update(probe, S1E3M7, 0.5))
        root = jax.random.key(5)
        subsets = {}
        for round in range(3):
            for user in range(3):
                key = jax.random.fold_in(jax.random.fold_in(root, round), user)
                given, told = update(kernels, 1, 2, key, 3, round)
                hits = [bool(np.any(given[name] != kernels[name])) for name in kernels]
                assert sum(hits) == 6
                subsets[round, user] = tuple(hits)
                np.testing.assert_array_equal(told[0], jax.random.key_data(key))
                assert told[1:] == (1, 2, 3, round)
        again, _ = update(kernels, 1, 2, key, 3, 2)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, given))
    assert len(set(subsets.values())) == 9


@pytest.mark.parametrize("count, share", [(7, 0.9), (1, 0.9), (40, 0.29)])
def test_every_variable_has_the_stated_share(count, share):
    keys = jax.random.split(jax.random.key(0), 4000)
    hits = np.asarray(jax.jit(jax.vmap(lambda key: online.choose(key, count, share)))(keys))
    sizes = hits.sum(1)
    assert set(sizes) <= {int(np.floor(share * count)), int(np.ceil(share * count))}
    np.testing.assert_allclose(hits.mean(0), share, atol=0.035)
    np.testing.assert_allclose(sizes.mean() / count, share, atol=0.02)


def test_select_sees_paths_and_refuses_other_types():
    params = parameters()

    def even(path, leaf):
        del leaf
        return path.endswith("kernel") and int(path.split("/")[0][-1]) % 2 == 0

    out = online.compress_params(params, S1E3M7, jax.random.key(0), 1.0, even)
    for i, name in enumerate(NAMES):
        assert np.any(out[name]["kernel"] != params[name]["kernel"]) == (i % 2 == 0)
    half = {"a": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}
    key = jax.random.key(0)
    for function in (
        lambda: online.compress_params(half, S1E3M7, key),
        lambda: online.compress_variable(half["a"]["kernel"], S1E3M7),
    ):
        with pytest.raises(UserError, match="bfloat16"):
            function()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="share"):
            online.compress_params(params, S1E3M7, key, share)
        with pytest.raises(UserError, match="share"):
            online.as_client_update(None, S1E3M7, share)
        with pytest.raises(UserError, match="share"):
            transport_bytes(params, S1E3M7, share=share)
    # Nothing to compress is no mistake.
    vectors = {"bias": np.ones(3, np.float32), "none": np.ones((0, 3), np.float32)}
    out = online.compress_params(vectors, S1E3M7, key)
    assert [bits(x) for x in jax.tree.leaves(out)] == [bits(x) for x in jax.tree.leaves(vectors)]


def test_vmap_over_clients_equals_a_loop():
    params = parameters()
    keys = jax.random.split(jax.random.key(7), 4)
    mapped = jax.jit(jax.vmap(lambda key: online.compress_params(params, S1E3M7, key, 0.5)))(keys)
    for i, key in enumerate(keys):
        alone = compressor()(params, key)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=3e-7, atol=1e-7)


def test_no_gradient_passes():
    def loss(params):
        return jnp.sum(online.compress_params(params, S1E3M7, jax.random.key(0), 1.0)["w"] ** 2)

    assert not np.any(jax.jit(jax.grad(loss))({"w": normal(0)})["w"])


# Training.

STEPS, BATCH = 3, 2
PARAMS = {"w": normal(10), "b": np.zeros(SHAPE[1], np.float32)}


def network(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    hidden = jnp.tanh((batch["x"] + noise) @ params["w"] + params["b"])
    values = (jnp.sum(jnp.tanh(hidden), axis=-1) - batch["y"]) ** 2
    loss = jnp.sum(jnp.where(batch["mask"], values, 0.0)) / jnp.maximum(batch["mask"].sum(), 1)
    return loss, {"examples": batch["mask"].sum()}


# Deltas are far below the numbers of small formats.
LOCAL = local_training(network, optax.sgd(1e-4))
local = jax.jit(LOCAL)


def batches(seed, leading=(STEPS, BATCH)):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(*leading, SHAPE[0])).astype(np.float32),
        "y": rng.normal(size=leading).astype(np.float32),
        "mask": np.ones(leading, bool),
    }


def received(fmt):
    return PARAMS | {"w": both(PARAMS["w"], fmt)[2]}


def test_a_client_trains_from_what_it_received():
    update = jax.jit(online.as_client_update(LOCAL, S1E2M3, 1.0))
    key = jax.random.key(3)
    assert squares(received(S1E2M3)["w"] - PARAMS["w"]) > 1e-3
    delta, metrics = update(PARAMS, batches(0), STEPS, key)
    expected, expected_metrics = local(received(S1E2M3), batches(0), STEPS, key)
    for name in PARAMS:
        # Differences of parameters of order 1 in float32.
        np.testing.assert_allclose(delta[name], expected[name], atol=6e-7)
    assert squares(delta["w"]) > 1e-8
    np.testing.assert_allclose(metrics.loss, expected_metrics.loss, rtol=1e-5)
    # No training, no delta, although the download was rounded.
    idle, _ = update(PARAMS, batches(0), 0, key)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(idle))


def test_the_delta_can_be_compressed_too():
    key = jax.random.key(4)
    update = jax.jit(online.as_client_update(LOCAL, S1E2M3, 1.0, upload=S1E4M3))
    exact, _ = local(received(S1E2M3), batches(0), STEPS, key)
    delta, _ = update(PARAMS, batches(0), STEPS, key)
    assert np.abs(exact["w"]).max() < S1E4M3.min_subnormal / 2
    assert 0 < squares(delta["w"] - exact["w"]) < 0.01 * squares(exact["w"])
    np.testing.assert_allclose(delta["b"], exact["b"], atol=6e-7)
    idle, _ = update(PARAMS, batches(0), 0, key)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(idle))
    bad = batches(0) | {"x": np.full((STEPS, BATCH, SHAPE[0]), np.nan, np.float32)}
    assert np.all(np.isnan(update(PARAMS, bad, STEPS, key)[0]["w"]))


def test_clipping_bounds_what_a_cohort_adds():
    bound = 1e-4
    update = online.as_client_update(LOCAL, S1E2M3, 0.5, align=True, upload=S1E4M3)
    cohort = make_cohort(update, clip_by_layer(bound), client_mesh(jax.devices()[:1]))
    round_key = jax.random.key(6)

    def total(users, steps):
        chunk = Chunk(
            batches(1, (2, STEPS, BATCH)),
            np.int32(steps),
            np.int32(users),
            (np.int32(steps) > 0).astype(np.float32),
        )
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(chunk))
        sums = cohort.add(sums, PARAMS, chunk, round_key, np.int32(0))
        return jax.device_get(cohort.total(sums))

    def shapes(chunk):
        return jax.eval_shape(cohort.zeros, PARAMS, chunk)

    first, second = total([1, 2], [STEPS, 0]), total([1, 2], [0, STEPS])
    for alone in (first, second):
        norm = np.sqrt(sum(squares(leaf) for leaf in jax.tree.leaves(alone.delta)))
        assert 0.7 * bound < norm <= bound * (1 + 1e-6)
        assert alone.clients == 1 and alone.invalid == 0 and alone.clipped.any()
    together = total([1, 2], [STEPS, STEPS])
    for name in PARAMS:
        sum_of_two = first.delta[name] + second.delta[name]
        np.testing.assert_allclose(together.delta[name], sum_of_two, rtol=1e-5, atol=1e-9)
    nobody = total([1, 2], [0, 0])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nobody))
