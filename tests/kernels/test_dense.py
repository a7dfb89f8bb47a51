import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels.dense import product

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("clients", [0, 3])
def test_product_has_the_derivatives_of_a_product(dtype, clients):
    rng = np.random.default_rng(0)
    lead = (clients,) if clients else ()
    x = jnp.asarray(rng.standard_normal((*lead, 2, 5, 7)), dtype)
    kernel = jnp.asarray(rng.standard_normal((*lead, 7, 4)), dtype)
    weights = jnp.asarray(rng.standard_normal((*lead, 2, 5, 4)), dtype)

    def gradients(function):
        one = jax.grad(lambda x, k, w: jnp.sum(function(x, k) * w, dtype=jnp.float32), (0, 1))
        return (jax.vmap(one) if clients else one)(x, kernel, weights)

    # A bfloat16 sum of ten products of unit size.
    atol = 1e-5 if dtype == jnp.float32 else 0.1
    found, expected = gradients(product), gradients(lambda x, k: x @ k)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=atol)
