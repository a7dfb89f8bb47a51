import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels.checkpoint import checkpoint
from fedasr.models.layers import dropout

# Compiling is what takes the time here.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def test_checkpointing_draws_the_same_numbers_again():
    def block(w, x, keys):
        return dropout(jnp.sin(w * x), 0.5, keys)

    def total(function):
        return lambda w, x, keys: jnp.sum(
            function(w, x, keys) * jnp.arange(x.size).reshape(x.shape)
        )

    keys = jax.random.split(jax.random.key(0), 2)
    arguments = jnp.float32(0.7), jnp.linspace(0, 1, 40).reshape(2, 5, 4), keys
    expected, got = (
        jax.jit(jax.grad(total(f), (0, 1)), compiler_options=COMPILER)(*arguments)
        for f in (block, checkpoint(block))
    )
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert 0.2 < np.mean(np.asarray(got[1]) == 0) < 0.8


def test_checkpointing_keeps_what_is_not_finite():
    checkpointed = checkpoint(lambda w, x, scale: jnp.tanh(w * x) * scale)
    w, x = jnp.float32(0.5), jnp.ones(3)
    gradient = jax.jit(jax.grad(lambda w, scale: jnp.sum(checkpointed(w, x, scale))))
    assert gradient(w, 2.0) == pytest.approx(6 / np.cosh(0.5) ** 2, rel=1e-5)
    for scale in (np.nan, np.inf):
        assert not np.isfinite(gradient(w, scale))
