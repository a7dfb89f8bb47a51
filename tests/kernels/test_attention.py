import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels.attention import attention

pytestmark = pytest.mark.usefixtures("optimized")


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

    found = gradients(lambda q, k, v: attention(q, k, v, mask, kept))
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
            out = attention(q, *values[1:3], mask, None)
            return jnp.sum(out * values[3], dtype=jnp.float32)

        return np.asarray(jax.grad(total)(values[0]), np.float32)

    exact = by_query(jnp.float32)
    error = np.linalg.norm(by_query(jnp.bfloat16) - exact) / np.linalg.norm(exact)
    assert error < 0.1
