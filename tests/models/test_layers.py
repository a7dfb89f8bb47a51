import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.models import layers


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


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
