import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.models import layers


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("frames", "width", "stride"), [(12, 7, 3), (13, 7, 3), (14, 4, 2), (5, 1, 2), (2, 7, 3)]
)
def test_patches_and_a_dense_layer_are_a_strided_convolution(frames, width, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, frames, 3))
    kernel = rng.normal(size=(width, 3, 4))
    out = np.asarray(layers.patches(jnp.asarray(x, jnp.float32), width, stride))
    assert out.shape == (2, -(-frames // stride), width * 3)
    expected = np.zeros((2, out.shape[1], 4))
    for i in range(out.shape[1]):
        for w in range(width):
            at = i * stride + w - (width - 1) // 2
            if 0 <= at < frames:
                expected[:, i] += x[:, at] @ kernel[w]
    np.testing.assert_allclose(out @ kernel.reshape(-1, 4), expected, rtol=1e-4, atol=1e-5)


def test_patches_of_longer_padding_begin_alike():
    x = np.random.default_rng(0).normal(size=(1, 8, 2)).astype(np.float32)
    short = layers.patches(jnp.asarray(x), 7, 3)
    long = layers.patches(jnp.pad(x, ((0, 0), (0, 9), (0, 0))), 7, 3)
    np.testing.assert_array_equal(short, long[:, : short.shape[1]])


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    rate = 0.3
    x = jnp.ones((3, 200, 100))
    out = np.asarray(layers.dropout(x, rate, keys(3)))
    values = np.unique(out)
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-6)
    for utterance in out:
        assert (utterance == 0).mean() == pytest.approx(rate, abs=0.02)
        assert utterance.mean() == pytest.approx(1.0, abs=0.03)
    assert np.any(out[0] != out[1])
    assert np.any(out != layers.dropout(x, rate, keys(3, seed=1)))


def test_dropout_of_an_utterance_depends_on_its_key_alone():
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    k = keys(3)
    alone = layers.dropout(jnp.asarray(x), 0.5, k[:2])
    padded = layers.dropout(jnp.pad(x, ((0, 1), (0, 5), (0, 0))), 0.5, k)
    np.testing.assert_array_equal(alone, padded[:2, :6])
    assert layers.dropout(x, 0.5, None) is x and layers.dropout(x, 0.0, k[:2]) is x


def test_split_keys_are_independent():
    assert layers.split_keys(None, 3) == [None] * 3
    split = layers.split_keys(keys(2), 3)
    data = np.concatenate([jax.random.key_data(k) for k in [*split, keys(2)]])
    assert len(np.unique(data, axis=0)) == 8


def test_an_input_layer_begins_as_the_identity_and_keeps_padding_zero():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    lengths = jnp.array([5, 2])
    layer = layers.InputLayer()
    params = layer.init(jax.random.key(1), x, lengths)
    inside = (np.arange(5) < np.array([[5], [2]]))[..., None]
    np.testing.assert_array_equal(layer.apply(params, x, lengths), np.where(inside, x, 0))
    kernel, bias = np.arange(9.0).reshape(3, 3), np.array([1.0, -2.0, 3.0])
    found = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x, lengths)
    np.testing.assert_allclose(found, np.where(inside, x @ kernel + bias, 0), rtol=1e-5)


def test_sinusoidal_positions():
    positions = np.float32([[0.0, 1.5, -20.0]])
    out = np.asarray(layers.sinusoidal_positions(jnp.asarray(positions), 6))
    frequencies = 10000.0 ** (-np.arange(3) / 3)
    angles = positions[..., None].astype(np.float64) * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.fixture(scope="module")
def norm():
    module = layers.MaskedNorm()
    return jax.jit(lambda scale, bias, x, n: module.apply(
        {"params": {"scale": scale, "bias": bias}}, x, n))  # fmt: skip


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    garbage=st.sampled_from([0.0, 1e6, np.nan, np.inf]),
)
@settings(deadline=None, max_examples=25)
def test_masked_norm_sees_only_the_true_frames(norm, seed, lengths, garbage):
    x = np.random.default_rng(seed).normal(2.0, 3.0, size=(3, 9, 4)).astype(np.float32)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = garbage
    out = np.asarray(norm(2.0, 0.5, x, np.int32(lengths)))
    for row, value, length in zip(out, x, lengths, strict=True):
        assert not row[length:].any()
        true = value[:length].astype(np.float64)
        if length:
            expected = (true - true.mean()) / np.sqrt(true.var() + 1e-5) * 2.0 + 0.5
            np.testing.assert_allclose(row[:length], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def attention():
    module = layers.SelfAttention(heads=2, dropout=0.4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8)), jnp.float32)
    mask = jnp.arange(7) < jnp.asarray([[5], [7]])
    params = module.init(jax.random.key(0), x, mask, None)
    return jax.jit(module.apply), params, np.asarray(x), np.asarray(mask)


@pytest.mark.parametrize("rotary", [False, True])
def test_fused_attention_equals_plain_attention(attention, rotary):
    """Outputs of true frames and gradients; padding changes nothing, nor does an empty slot."""
    _, params, x, _ = attention
    mask = np.arange(7) < np.array([[5], [0]])
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32) * mask[..., None]

    def outputs(fused, x):
        module = layers.SelfAttention(2, rotary_positions=rotary, fused=fused)

        def total(params, x):
            out = module.apply(params, x, mask, None)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x)

    (_, plain), plain_grads = outputs(False, x)
    (_, fused), fused_grads = outputs(True, x)
    np.testing.assert_allclose(fused[mask], plain[mask], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fused_grads, plain_grads)
    (_, other), _ = outputs(True, np.where(mask[..., None], x, 9.0).astype(np.float32))
    np.testing.assert_allclose(other[mask], fused[mask], atol=1e-6)
    assert np.isfinite(fused).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dropped", [False, True])
def test_attention_has_the_derivatives_of_its_definition(dropped, dtype):
    """With padding, and with an utterance that is nothing else."""
    rng = np.random.default_rng(0)
    q, k, v, outer = jnp.asarray(rng.standard_normal((4, 3, 5, 2, 4)), dtype)
    mask = np.arange(5) < np.array([[5], [3], [0]])
    kept = jnp.asarray(rng.choice([0.0, 1.6], (3, 2, 5, 5)), jnp.float32) if dropped else None

    def definition(q, k, v):
        scores = jnp.einsum("bqhe,bkhe->bhqk", q, k).astype(jnp.float32) / 2
        weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e30), axis=-1)
        weights = weights if kept is None else weights * kept
        return jnp.einsum("bhqk,bkhe->bqhe", weights.astype(v.dtype), v)

    def gradients(function):
        def total(*args):
            return jnp.sum(function(*args) * outer, dtype=jnp.float32)

        return jax.value_and_grad(total, (0, 1, 2))(q, k, v)

    found = gradients(lambda q, k, v: layers.attention(q, k, v, mask, kept))
    atol = 1e-5 if dtype == jnp.float32 else 0.05
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients(definition)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5 if dtype == jnp.float32 else 0.02)
    for by in found[1][:2]:
        assert not np.asarray(by[2], np.float32).any()


def test_the_derivative_of_attention_in_half_precision_where_keys_are_alike():
    """The derivatives by a query's scores cancel: what is left of them multiplies the mean key."""
    rng = np.random.default_rng(0)
    q, k, v, outer = (rng.standard_normal((4, 1, 100, 1, 8))).astype(np.float32)
    k, v = k + 2, 0.3 * v + 2
    mask = np.ones((1, 100), bool)

    def by_query(dtype):
        values = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (q, k, v, outer)]

        def total(q):
            out = layers.attention(q, *values[1:3], mask, None)
            return jnp.sum(out * values[3], dtype=jnp.float32)

        return np.asarray(jax.grad(total)(values[0]), np.float32)

    exact = by_query(jnp.float32)
    error = np.linalg.norm(by_query(jnp.bfloat16) - exact) / np.linalg.norm(exact)
    assert error < 0.1


def test_attention_equals_a_plain_loop_over_heads(attention):
    apply, params, x, mask = attention
    out = np.asarray(apply(params, x, mask, None))
    kernel = np.asarray(params["params"]["qkv"]["kernel"], np.float64)
    last = np.asarray(params["params"]["out"]["kernel"], np.float64)
    for row, m, got in zip(x.astype(np.float64), mask, out, strict=True):
        q, k, v = np.split(row @ kernel, 3, axis=-1)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = np.exp(q[:, h] @ k[m][:, h].T / 2.0)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[m][:, h])
        np.testing.assert_allclose(got, np.concatenate(heads, -1) @ last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropped", [False, True])
def test_attention_never_attends_to_padding(attention, dropped):
    apply, params, x, mask = attention
    k = keys(2) if dropped else None
    clean = np.asarray(apply(params, x, mask, k))
    garbage = np.where(mask[..., None], x, 1e4).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(apply(params, garbage, mask, k))[mask], clean[mask])
    longer = np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=9.0)
    more = np.asarray(apply(params, longer, np.pad(mask, ((0, 0), (0, 4))), k))
    np.testing.assert_allclose(more[:, :7][mask], clean[mask], rtol=1e-5, atol=1e-6)
    if dropped:
        assert np.abs(clean - apply(params, x, mask, None))[mask].max() > 1e-2


def test_uniform_fan_in():
    values = np.asarray(layers.uniform_fan_in()(jax.random.key(0), (50, 400)))
    assert 0.97 * 50**-0.5 < np.abs(values).max() <= 50**-0.5
    assert values.std() == pytest.approx((3 * 50) ** -0.5, rel=0.03)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("clients", [0, 3])
def test_product_has_the_derivatives_of_a_product(dtype, clients):
    rng = np.random.default_rng(0)
    lead = (clients,) if clients else ()
    x = jnp.asarray(rng.standard_normal((*lead, 2, 5, 7)), dtype)
    kernel = jnp.asarray(rng.standard_normal((*lead, 7, 4)), dtype)
    weights = jnp.asarray(rng.standard_normal((*lead, 2, 5, 4)), dtype)

    def gradients(product):
        one = jax.grad(lambda x, k, w: jnp.sum(product(x, k) * w, dtype=jnp.float32), (0, 1))
        return (jax.vmap(one) if clients else one)(x, kernel, weights)

    # A bfloat16 sum of ten products of unit size.
    atol = 1e-5 if dtype == jnp.float32 else 0.1
    found, expected = gradients(layers.product), gradients(lambda x, k: x @ k)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=atol)


@pytest.mark.parametrize("scale", [1.0, -0.7, 0.11, 0.05, 0.0])
@pytest.mark.parametrize(("frames", "width", "stride"), [(13, 7, 3), (4, 3, 3), (6, 4, 2)])
def test_affine_product_has_the_derivatives_of_patches(scale, frames, width, stride):
    """Of scale and bias, too, also near a scale of zero, under a vmap and with padding."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(width * 5, 4)).astype(np.float32)
    weights = rng.normal(size=(2, -(-frames // stride), 4)).astype(np.float32)
    x = rng.normal(size=(2, frames, 5)).astype(np.float32)
    lengths = np.int32([frames, frames - 2])
    module = layers.MaskedNorm()

    def loss(params, own):
        norm, kernel = params
        out, *parts = module.apply({"params": norm}, x, lengths, parts=True)
        if own:
            windows, dot = layers.front_end_product(out, *parts, width, stride)
            y = dot(windows, kernel)
        else:
            y = layers.patches(out, width, stride) @ kernel
        return jnp.sum(jnp.tanh(y) * weights)

    norms = {"scale": jnp.float32([scale, 0.6]), "bias": jnp.float32([0.3, -0.2])}
    kernels = jnp.stack([kernel, kernel[::-1]])
    for i in (0, 1):
        one = (jax.tree.map(lambda a, i=i: a[i], norms), kernels[i])
        found, expected = (jax.value_and_grad(loss)(one, own) for own in (True, False))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
        )
    found, expected = (
        jax.vmap(jax.grad(loss), (0, None))((norms, kernels), own) for own in (True, False)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
