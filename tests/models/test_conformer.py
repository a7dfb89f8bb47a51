import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.models import layers
from fedasr.models.conformer import Conformer, ConformerConfig
from fedasr.models.recogniser import make_recogniser
from fedasr.recipes import large_asr

TINY = ConformerConfig(vocab=6, features=8, dim=16, blocks=1, heads=2, mlp=16, conv_kernel=4)
RANDOM = dataclasses.replace(TINY, dropout=0.3, layer_drop=0.2)
# Compiling is what takes the time here.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LENGTHS = np.int32([13, 20])
FRAMES = [4, 5]  # of the encoder


def jit(function):
    return jax.jit(function, compiler_options=COMPILER)


def keys(seed, count=2):
    """One key per slot, the same for a slot however many there are."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


@pytest.fixture(scope="module")
def params():
    example = jnp.zeros((1, 16, 8)), jnp.full(1, 16)
    shapes = jax.eval_shape(Conformer(TINY).init, jax.random.key(0), *example)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.uniform(-0.7, 0.7, x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def features():
    x = np.random.default_rng(0).normal(size=(2, 20, 8)).astype(np.float32)
    x[0, 13:] = 0.0
    return x


@pytest.fixture(scope="module")
def plain():
    return jit(lambda p, x, n: Conformer(TINY).apply({"params": p}, x, n))


@pytest.fixture(scope="module")
def random():
    return jit(lambda p, x, n, k: Conformer(RANDOM).apply({"params": p}, x, n, k))


@pytest.fixture(scope="module")
def trained():
    """Scores in training and the gradient of a sum over true frames."""

    def total(params, x, lengths, k):
        logits, frames = Conformer(RANDOM).apply({"params": params}, x, lengths, k)
        true = jnp.arange(logits.shape[1]) < frames[:, None]
        weights = jnp.sin(jnp.arange(logits[0].size)).reshape(logits.shape[1:])
        return jnp.sum(jnp.where(true[..., None], logits * weights, 0.0)), (logits, frames)

    return jit(jax.value_and_grad(total, has_aux=True))


def test_rotary_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 8)).astype(np.float32)
    frames = np.ones((1, 30, 1, 1), np.float32)
    turn = jit(layers.rotary)
    products = np.einsum("bqhe,bkhe->hqk", turn(q * frames), turn(k * frames))
    for distance in (-20, -1, 0, 7):
        diagonal = np.diagonal(products, distance, axis1=1, axis2=2)
        np.testing.assert_allclose(diagonal, diagonal[:, :1] + 0 * diagonal, atol=1e-4)
    assert np.ptp(products[:, 0], axis=-1).min() > 0.5
    np.testing.assert_allclose(products[:, 3, 3], np.sum(q * k, -1)[0, 0], atol=1e-5)


def assert_invariant(short, long):
    logits, counts = short
    more, more_counts = long
    np.testing.assert_array_equal(counts, FRAMES)
    np.testing.assert_array_equal(more_counts[:2], FRAMES)
    for i, n in enumerate(FRAMES):
        np.testing.assert_allclose(logits[i, :n], more[i, :n], rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_padding(plain, params, features):
    short = plain(params, features, LENGTHS)
    assert short[0].shape == (2, 5, 6) and short[0].dtype == jnp.float32
    longer = np.pad(features, ((0, 2), (0, 11), (0, 0)), constant_values=np.nan)
    longer[2] = 5.0
    assert_invariant(short, plain(params, longer, np.int32([*LENGTHS, 0, 0])))
    # What the padding holds does not matter either, and other utterances neither.
    dirty = features.copy()
    dirty[0, 13:] = np.nan
    dirty[1] = 0.0
    np.testing.assert_allclose(
        plain(params, dirty, LENGTHS)[0][0, :4], short[0][0, :4], rtol=1e-5, atol=1e-5
    )
    assert np.abs(short[0][0, :4] - short[0][1, :4]).max() > 1e-2


def test_training_does_not_depend_on_padding(trained, random, params, features):
    clean = np.pad(features, ((0, 2), (0, 11), (0, 0)))
    dirty = np.pad(features, ((0, 2), (0, 11), (0, 0)), constant_values=np.nan)
    dirty[0, 13:] = np.nan
    lengths = np.int32([*LENGTHS, 0, 0])
    seen, largest = [], []
    for seed in range(3):
        (_, long), gradient = trained(params, clean, lengths, keys(seed, 4))
        assert_invariant(random(params, features, LENGTHS, keys(seed)), long)
        (_, same), same_gradient = trained(params, dirty, lengths, keys(seed, 4))
        np.testing.assert_array_equal(long[0], same[0])
        jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
        seen.append(np.asarray(long[0][0, :4]))
        largest.append(jax.tree.map(lambda g: np.abs(g).max(), gradient))
    assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.pairwise(seen))
    # Layer drop may have skipped the block once or twice.
    assert all(x > 1e-4 for x in jax.tree.leaves(jax.tree.map(max, *largest)))


def test_bfloat16_computes_but_does_not_store(params, features, plain):
    model = Conformer(dataclasses.replace(TINY, dtype="bfloat16"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), features, LENGTHS)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    logits, _ = jit(lambda p: model.apply({"params": p}, features, LENGTHS))(params)
    exact = np.asarray(plain(params, features, LENGTHS)[0])
    assert logits.dtype == jnp.float32 and np.all(np.isfinite(logits))
    error = np.abs(logits - exact)[1].max()
    assert 0 < error < 0.1 * np.abs(exact).max()


def test_the_large_one_has_the_published_size():
    config = large_asr.get_config()
    model = make_recogniser(config.model.name, config.model.options)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    d, blocks = 512, 21
    front = 3 * 80 * 2 * d + 2 * d + 3 * d * 2 * d + 2 * d
    # Feed-forward, attention, convolution; filters and six layer norms.
    block = (2 * 8 + 4 + 3) * d * d + (32 + 6 * 2) * d
    expected = 2 + front + blocks * block + d * 30 + 30
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected == 128_924_704
    assert abs(expected / 130e6 - 1) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert config.model.options.remat == "block"


def test_arguments_of_the_configuration():
    config = large_asr.get_config("size=small,remat=block,cohort=3,data=somewhere")
    assert ConformerConfig(**config.model.options) == ConformerConfig(remat="block")
    assert config.cohort == 3 and config.data.dir == "somewhere" and config.client.steps == 1
    assert large_asr.get_config("size=small").model.options.remat == "none"
    with pytest.raises(UserError, match=r"size='huge'.*large, small"):
        large_asr.get_config("size=huge")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"stride": 3}, "stride"),
        ({"stride": 1}, "stride"),
        ({"dim": 20, "heads": 4}, "twice its heads"),
        ({"conv_kernel": 0}, "conv_kernel must be at least 1"),
        ({"remat": "all"}, "'none' or 'block'"),
        ({"dtype": "int8"}, "dtype"),
        ({"attention": "flash"}, "'plain' or 'fused'"),
    ],
)
def test_mistaken_options(mistake, message):
    with pytest.raises(UserError, match=message):
        ConformerConfig(**mistake)
