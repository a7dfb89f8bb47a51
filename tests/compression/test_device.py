import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.compression import device, online
from fedasr.compression.formats import FloatFormat, decode, encode, pack, unpack
from fedasr.models.conformer import Conformer, ConformerConfig
from fedasr.models.encoder_blocks import is_lazy, realise
from fedasr.models.transformer import Transformer, TransformerConfig

S1E3M7 = FloatFormat(3, 7)
TINY = {
    "transformer": {"dim": 16, "blocks": 1, "heads": 2, "mlp": 24, "features": 8},
    "conformer": {
        "dim": 16,
        "blocks": 1,
        "heads": 2,
        "mlp": 24,
        "features": 8,
        "conv_kernel": 4,
    },
}


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(0, 23),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70),
)
def test_packed_codes_come_back(exponent, mantissa, numbers):
    fmt = FloatFormat(exponent, mantissa)
    codes = np.asarray([n % 2**fmt.bits for n in numbers], fmt.dtype)
    words = pack(jnp.asarray(codes), fmt)
    assert words.nbytes == 4 * fmt.bits * -(-len(codes) // 32)
    np.testing.assert_array_equal(unpack(words, fmt, codes.shape), codes)


def test_a_packed_variable_is_the_compressed_one():
    value = np.random.default_rng(0).normal(size=(33, 7)).astype(np.float32)
    packed = device.pack_variable(value, S1E3M7)
    stored = online.compress_variable(value, S1E3M7, align=True)
    np.testing.assert_array_equal(packed.array(), online.decompress_variable(stored))
    held = sum(x.nbytes for x in jax.tree.leaves(packed))
    assert held == 4 * 11 * 8 + 8  # 231 codes in 8 columns, scale and bias
    assert np.any(decode(encode(value, S1E3M7), S1E3M7))


def test_only_chosen_matrices_are_packed():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones(4), "c": jnp.ones((2, 2)), "d": jnp.ones((3, 3))}
    stored = device.pack_params(params, S1E3M7, [True, False, True])
    assert [is_lazy(stored[name]) for name in "abcd"] == [True, False, False, True]
    np.testing.assert_array_equal(realise(stored)["d"], params["d"])


MODULES = {
    "transformer": (Transformer, TransformerConfig),
    "conformer": (Conformer, ConformerConfig),
}


@pytest.mark.parametrize(
    "name, remat", [("transformer", "none"), ("transformer", "block"), ("conformer", "block")]
)
def test_the_program_computes_the_simulated_update(name, remat):
    module, config = MODULES[name]
    module = module(config(**TINY[name], remat=remat, dropout=0.1))
    features, lengths = jax.random.normal(jax.random.key(1), (2, 40, 8)), jnp.asarray([40, 31])
    params = jax.jit(module.init)(jax.random.key(0), features, lengths)["params"]
    batch, key = {"features": features, "features_length": lengths}, jax.random.key(7)

    # CTC takes longer to compile than all the rest, and knows nothing of parameters.
    def loss(params, batch, key):
        keys = jax.random.split(key, 2)
        logits, _ = module.apply({"params": params}, *batch.values(), keys)
        return jnp.mean(logits**2), {}

    count = sum(online.flags(params, online.weight_matrices))
    subset = jax.random.key(11)
    chosen = [bool(x) for x in online.choose(subset, count, 0.5)]
    received = online.compress_params(params, S1E3M7, subset, 0.5, align=True)
    stored = device.pack_params(params, S1E3M7, chosen)

    trained = [i % 2 == 0 for i in range(len(jax.tree.leaves(params)))]
    program = device.fedsgd_program(loss, trained)

    @jax.jit
    def both(received, stored):
        return jax.grad(lambda p: loss(p, batch, key)[0])(received), program(stored, batch, key)

    expected, (found, value) = both(received, stored)
    assert np.isfinite(value) and len(found) == sum(trained)
    for (path, gradient), yes in zip(jax.tree.leaves_with_path(expected), trained, strict=True):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (path in found) == yes
        if yes:
            scale = np.max(np.abs(gradient))
            np.testing.assert_allclose(found[path], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_uploads_are_clipped_and_packed():
    def loss(params, batch, key):
        return jnp.sum(params["w"] * batch["x"]) + jnp.sum(params["b"]), {}

    params = {"b": jnp.zeros(2), "w": jnp.zeros((3, 2))}
    batch = {"x": jnp.arange(6.0).reshape(3, 2)}
    program = device.fedsgd_program(loss, upload=S1E3M7, grad_clip=1.0)
    found, _ = program(params, batch, jax.random.key(0))
    norm = np.sqrt(np.sum(np.arange(6.0) ** 2) + 2)
    np.testing.assert_allclose(found["b"], 1 / norm, rtol=1e-6)
    assert isinstance(found["w"], device.Packed)
    np.testing.assert_allclose(found["w"].array(), batch["x"] / norm, atol=2e-3)


def test_measured_memory_counts_what_is_held():
    n = 256

    def product(params, x):
        return params["w"] @ (x @ x)

    memory = device.measure(product, {"w": jnp.ones((n, n))}, jnp.ones((n, n)))
    matrix = 4 * n * n
    assert memory.parameters == matrix and memory.arguments == 2 * matrix
    assert memory.outputs == matrix
    assert 4 * matrix <= memory.peak < 6 * matrix
