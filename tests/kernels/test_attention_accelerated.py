"""Attention's and the norms' kernels, interpreted on the CPU, compute what everybody else's do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr import generators
from fedasr.kernels import attention, attention_accelerated, norm_accelerated
from fedasr.models import layers

# kind, frames, heads, features of a head, dropout: whole tiles and not, odd sizes
CASES = [
    ("tpu", 40, 2, 16, 0.3),
    ("tpu", 19, 1, 12, 0.0),
    ("gpu", 70, 2, 16, 0.3),
    ("gpu", 64, 1, 36, 0.0),
]


def drawn(b, t, heads, e, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((b, t, 3 * heads * e), (b, t, heads * e))
    return [jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes]


def keys_of(b):
    root = jax.random.wrap_key_data(jnp.asarray([7, 2**31 + 5], jnp.uint32), impl=generators.HASHED)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(b))


def plainly(qkv, lengths, keys, heads, rate):
    """As `layers.SelfAttention` computes it where there is no kernel."""
    b, t, wide = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, heads, -1), 2, 0)
    factors = None
    if rate:
        by_frame = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(
            jnp.arange(t)))(keys)  # fmt: skip
        ones = jnp.ones((1, t, heads))
        draw = jax.vmap(jax.vmap(lambda key: layers.dropout(ones, rate, key[None])[0]))
        factors = jnp.transpose(draw(by_frame), (0, 3, 1, 2))
    mask = jnp.arange(t) < lengths[:, None]
    return attention.attention(q, k, v, mask, factors).reshape(b, t, wide // 3)


@pytest.mark.parametrize(("kind", "t", "heads", "e", "rate"), CASES)
def test_values_gradients_and_dropout_are_the_same(kind, t, heads, e, rate):
    qkv, slopes = drawn(2, t, heads, e)
    lengths, keys = jnp.asarray([t, t // 2], jnp.int32), keys_of(2)
    slopes = jnp.where((jnp.arange(t) < lengths[:, None])[..., None], slopes, 0)
    plan = attention_accelerated.Plan(kind, heads, rate, interpret=True)
    words = jax.random.key_data(keys)
    ways = (
        lambda x: plainly(x, lengths, keys, heads, rate),
        lambda x: attention_accelerated.attention(plan, x, lengths, words),
        lambda x: attention_accelerated.reference(plan, x, lengths, words),
    )
    true = (jnp.arange(t) < lengths[:, None])[..., None]
    results = []
    for way in ways:
        out, pull = jax.vjp(jax.jit(way), qkv)
        results.append((jnp.where(true, out, 0), pull(slopes)[0]))
    for found in results[1:]:
        for x, y in zip(found, results[0], strict=True):
            np.testing.assert_allclose(x, y, atol=3e-6)
    assert float(jnp.abs(results[0][1]).max()) > 0.1


def test_clients_side_by_side_are_one_batch():
    """And padding frames, or none that is true, leave nothing that is not finite."""
    plan = attention_accelerated.Plan("gpu", 1, 0.2, interpret=True)
    qkv, slopes = drawn(4, 20, 1, 16)
    lengths, words = jnp.asarray([20, 11, 0, 3]), jax.random.key_data(keys_of(4))

    def both(qkv, slopes, lengths, words):
        out, pull = jax.vjp(lambda x: attention_accelerated.attention(plan, x, lengths, words), qkv)
        return out, pull(slopes)[0]

    at_once = both(qkv, slopes, lengths, words)
    args = [x.reshape(2, 2, *x.shape[1:]) for x in (qkv, slopes, lengths, words)]
    for x, y in zip(at_once, jax.vmap(both)(*args), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y.reshape(x.shape))


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("clients", [0, 2])
def test_norms_are_the_same(summed, clients):
    d, rng = 48, np.random.default_rng(0)
    lead = (clients,) if clients else ()
    x, branch, direct, slopes = (
        jnp.asarray(rng.standard_normal((*lead, 2, 37, d)), jnp.float32) for _ in range(4)
    )
    scale, bias = (jnp.asarray(rng.standard_normal((*lead, d)), jnp.float32) for _ in range(2))

    keep = jnp.float32(0.5)

    def kernel(x, branch, scale, bias):
        factors = norm_accelerated.factors(scale, bias)
        return norm_accelerated.add_norm(jnp.float32, True, x, branch, keep, factors)

    def reference(x, branch, scale, bias):
        total = x if branch is None else x + keep * branch
        centred = total - total.mean(-1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
        return total, centred / deviation * scale + bias

    def both(way, *args):
        *inputs, direct, slopes = args
        out, pull = jax.vjp(way, *inputs)
        return out, pull((direct, slopes))

    args = (x, branch if summed else None, scale, bias, direct, slopes)
    results = []

    def plain(x, branch, scale, bias):
        return norm_accelerated.plain_add_norm(jnp.float32, x, branch, keep, scale, bias)

    def alone(x, branch, scale, bias):
        total = x if branch is None else x + keep * branch
        return total, norm_accelerated.norm(
            jnp.float32, True, total, norm_accelerated.factors(scale, bias)
        )

    for way in (reference, kernel, plain, alone):
        of = functools.partial(both, way)
        results.append(jax.jit(jax.vmap(of) if clients else of)(*args))
    for found in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, results[0])
