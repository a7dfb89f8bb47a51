import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.models.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(vocab=6, features=8, dim=16, blocks=1, heads=2, mlp=16)
RANDOM = dataclasses.replace(TINY, dropout=0.3, layer_drop=0.2, cape_shift=1.0)
# Compiling is what takes the time here.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LENGTHS = np.int32([13, 20])


def jit(function):
    return jax.jit(function, compiler_options=COMPILER)


@pytest.fixture(scope="module")
def params():
    example = jnp.zeros((1, 16, 8)), jnp.full(1, 16)
    return jit(Transformer(TINY).init)(jax.random.key(0), *example)["params"]


@pytest.fixture(scope="module")
def features():
    x = np.random.default_rng(0).normal(size=(2, 20, 8)).astype(np.float32)
    x[0, 13:] = 0.0
    return x


@pytest.fixture(scope="module")
def plain():
    return jit(lambda p, x, n: Transformer(TINY).apply({"params": p}, x, n))


@pytest.fixture(scope="module")
def random():
    return jit(lambda p, x, n, k: Transformer(RANDOM).apply({"params": p}, x, n, k))


def keys(seed, count=2):
    """One key per slot, the same for a slot however many there are."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def assert_invariant(short, long, lengths):
    logits, counts = short
    more, more_counts = long
    np.testing.assert_array_equal(counts, more_counts[:2])
    for i, n in enumerate(counts):
        assert n == -(-lengths[i] // 3)
        np.testing.assert_allclose(logits[i, :n], more[i, :n], rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_padding(plain, params, features):
    short = plain(params, features, LENGTHS)
    assert short[0].shape == (2, 7, 6) and short[0].dtype == jnp.float32
    longer = np.pad(features, ((0, 2), (0, 11), (0, 0)), constant_values=np.nan)
    longer[2] = 5.0
    assert_invariant(short, plain(params, longer, np.int32([*LENGTHS, 0, 0])), LENGTHS)
    # What the padding holds does not matter either, and other utterances neither.
    dirty = features.copy()
    dirty[0, 13:] = np.nan
    dirty[1] = 0.0
    np.testing.assert_allclose(
        plain(params, dirty, LENGTHS)[0][0, :5], short[0][0, :5], rtol=1e-5, atol=1e-5
    )
    assert np.abs(short[0][0, :5] - short[0][1, :5]).max() > 1e-2


def test_training_scores_do_not_depend_on_padding(random, plain, params, features):
    longer = np.pad(features, ((0, 2), (0, 11), (0, 0)), constant_values=3.0)
    longer_lengths = np.int32([*LENGTHS, 0, 9])
    quiet = plain(params, features, LENGTHS)[0]
    seen = []
    for seed in range(4):
        short = random(params, features, LENGTHS, keys(seed))
        assert_invariant(short, random(params, longer, longer_lengths, keys(seed, 4)), LENGTHS)
        seen.append(np.asarray(short[0][0, :5]))
        assert np.abs(seen[-1] - quiet[0, :5]).max() > 1e-2
    assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.pairwise(seen))


def test_layer_drop_of_one_skips_every_block(params, features):
    dropped = Transformer(dataclasses.replace(TINY, layer_drop=1.0))
    empty = Transformer(dataclasses.replace(TINY, blocks=0))
    rest = {name: value for name, value in params.items() if not name.startswith("block")}
    expected = jit(lambda p: empty.apply({"params": p}, features, LENGTHS)[0])(rest)
    out = jit(lambda p: dropped.apply({"params": p}, features, LENGTHS, keys(0))[0])(params)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_blocks_are_kept_at_their_rate_without_rescaling(params, features, plain):
    model = Transformer(dataclasses.replace(TINY, layer_drop=0.25))
    whole = np.asarray(plain(params, features, LENGTHS)[0])
    apply = jit(jax.vmap(
        lambda k: model.apply({"params": params}, features, LENGTHS, k)[0]))  # fmt: skip
    out = apply(jax.vmap(lambda s: jax.random.split(jax.random.key(s), 2))(jnp.arange(400)))
    kept = np.abs(np.asarray(out) - whole).max((1, 2, 3)) < 1e-4
    assert kept.mean() == pytest.approx(0.75, abs=0.08)
    # One draw for the batch: all the dropped ones are alike in every utterance.
    assert np.ptp(np.asarray(out)[~kept], axis=0).max() < 1e-4


def test_positions_matter_and_shift_as_a_whole(params, features, plain):
    still = np.zeros_like(features)
    still[:] = 1.0  # the same frame everywhere: only the position tells them apart
    logits = np.asarray(plain(params, still, np.int32([20, 20]))[0])
    assert np.abs(logits[0, 2] - logits[0, 4]).max() > 1e-2


def test_number_of_parameters_of_the_quickstart():
    model = Transformer(TransformerConfig())
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 30, 80)), jnp.full(1, 30)
    )  # fmt: skip
    front = 7 * 80 * 256 + 256
    block = 128 * 3 * 128 + 128 * 128 + 2 * 128 * 512 + 4 * 128
    expected = 2 + front + 4 * block + 2 * 128 + 128 * 30 + 30
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected == 936_224
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_bfloat16_computes_but_does_not_store(params, features, plain):
    model = Transformer(dataclasses.replace(TINY, dtype="bfloat16"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), features, LENGTHS)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    logits, _ = jit(lambda p: model.apply({"params": p}, features, LENGTHS))(params)
    exact = np.asarray(plain(params, features, LENGTHS)[0])
    assert logits.dtype == jnp.float32 and np.all(np.isfinite(logits))
    error = np.abs(logits - exact)[1].max()
    assert 0 < error < 0.1 * np.abs(exact).max()


def test_post_norm_normalises_every_sum(params, features):
    config = dataclasses.replace(TINY, norm="post")
    module = Transformer(config)
    example = jnp.zeros((1, 16, 8)), jnp.full(1, 16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    assert set(params) - set(shapes) == {"final_norm"}
    own = {name: value for name, value in params.items() if name in shapes}
    # With scale 1 and bias 0 the encoder's output has mean 0 and variance 1: what the output layer
    # sees is bounded, whatever the input.
    own["output"] = {"kernel": jnp.eye(16, 6), "bias": jnp.zeros(6)}
    logits, _ = jit(lambda p, x, n: module.apply({"params": p}, x, n))(own, 100 * features, LENGTHS)
    assert np.abs(logits).max() <= 4.0  # sqrt(16): one of 16 features has all the variance
    assert np.abs(logits).max() > 0.5
    with pytest.raises(UserError, match="'pre' or 'post'"):
        dataclasses.replace(TINY, norm="both")
    with pytest.raises(UserError, match="'none' or 'block'"):
        dataclasses.replace(TINY, remat="layer")


def test_fused_attention_scores_alike():
    features = np.random.default_rng(0).normal(size=(2, 40, TINY.features)).astype(np.float32)
    found = []
    for attention in ("plain", "fused"):
        module = Transformer(dataclasses.replace(TINY, attention=attention))
        params = module.init(jax.random.key(0), features, np.int32([40, 25]))
        logits, lengths = jit(module.apply)(params, features, np.int32([40, 25]))
        found.append((params, [row[:n] for row, n in zip(logits, lengths, strict=True)]))
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    for plain, fused in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(plain, fused, atol=1e-5)
