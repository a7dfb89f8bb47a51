"""The Transformer as the published recipes build it, against NumPy written from its description."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.models import encoder_blocks, layers, recogniser
from fedasr.models import transformer as module
from fedasr.models.transformer import Transformer, TransformerConfig
from fedasr.recipes.shared import MODEL_AS_PUBLISHED

SIZES = dict(vocab=6, features=5, dim=8, blocks=2, heads=2, mlp=12)
WAYS = ("branch_dropout", "front_end", "init", "layer_drop_per", "stream_dtype")
PUBLISHED = {name: MODEL_AS_PUBLISHED[name] for name in WAYS}
CONFIG = TransformerConfig(**SIZES, **PUBLISHED)
FRAMES, LENGTHS = 18, np.int32([18, 11])
GAIN = 1.25  # in place of dropout, wherever it is


def random_weights(config=CONFIG):
    """Weights of the model's shapes, all of them random: biases, scales and norms, too."""
    shapes = jax.eval_shape(
        Transformer(config).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, FRAMES, config.features), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: (0.5 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


FEATURES = np.random.default_rng(0).standard_normal((2, FRAMES, CONFIG.features)) * 2 + 1


# ------------------------------------------------------------------------------ the oracle, float64


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def oracle(p, features, length, shift=0.0, gain=1.0, kernel=7, stride=3, c=CONFIG):
    """Scores of one utterance [floor(length / 3), vocab].

    shift: of the positions, seconds. gain: what dropout multiplies by, where it is.
    """
    x = features.astype(np.float64)[:length]
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    x = x * p["input_norm"]["scale"] + p["input_norm"]["bias"]
    # A convolution with 2 frames before a window's first: those of "same" padding, 4 zeros in all.
    padded = np.concatenate([np.zeros((2, x.shape[1])), x, np.zeros((kernel, x.shape[1]))])
    count = length // stride
    windows = [padded[stride * i : stride * i + kernel].ravel() for i in range(count)]
    x = np.stack(windows) @ p["front_end"]["kernel"] + p["front_end"]["bias"]
    linear, gate = np.split(x, 2, axis=1)
    x = linear / (1 + np.exp(-gate)) * gain
    seconds = 0.03 * (np.arange(count) - (count - 1) / 2) + shift
    half = c.dim // 2
    angles = 30 * seconds[:, None] * 1e4 ** (-np.arange(half) / half)
    x = x + np.concatenate([np.sin(angles), np.cos(angles)], 1)
    for i in range(c.blocks):
        b = p[f"block_{i}"]
        qkv = layer_norm(x, b["attention_norm"]) @ b["attention"]["qkv"]["kernel"]
        heads = qkv.reshape(count, 3, c.heads, -1)
        joined = []
        for h in range(c.heads):
            q, k, v = heads[:, 0, h], heads[:, 1, h], heads[:, 2, h]
            scores = q @ k.T / np.sqrt(q.shape[1])
            weights = np.exp(scores - scores.max(1, keepdims=True))
            joined.append(gain * weights / weights.sum(1, keepdims=True) @ v)
        x = x + np.concatenate(joined, 1) @ b["attention"]["out"]["kernel"]
        hidden = np.maximum(layer_norm(x, b["mlp_norm"]) @ b["mlp"]["up"]["kernel"], 0)
        x = x + gain * hidden @ b["mlp"]["down"]["kernel"]
    return layer_norm(x, p["final_norm"]) @ p["output"]["kernel"] + p["output"]["bias"]


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.fixture(scope="module")
def params():
    return random_weights()


def test_forward_pass_equals_the_description(params):
    scores, counts = jax.jit(Transformer(CONFIG).apply)({"params": params}, FEATURES, LENGTHS)
    assert scores.shape == (2, 6, 6) and list(counts) == [6, 3]
    for i, length in enumerate(LENGTHS):
        expected = oracle(double(params), FEATURES[i], length)
        np.testing.assert_allclose(scores[i, : length // 3], expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal_differences_of_the_description(params):
    """Along a random direction of every variable, of a random function of the scores."""
    weigh = np.random.default_rng(1).standard_normal((2, 6, 6))

    def value(p):
        scores, counts = Transformer(CONFIG).apply({"params": p}, FEATURES, LENGTHS)
        inside = jnp.arange(6)[None] < counts[:, None]
        return jnp.sum(jnp.where(inside[..., None], scores * weigh, 0.0))

    def expected(p):
        found = [oracle(p, FEATURES[i], n) * weigh[i, : n // 3] for i, n in enumerate(LENGTHS)]
        return sum(x.sum() for x in found)

    gradients = jax.jit(jax.grad(value))(params)
    leaves, tree = jax.tree.flatten(double(params))
    rng, step = np.random.default_rng(2), 1e-6
    for place, (path, gradient) in enumerate(jax.tree_util.tree_leaves_with_path(gradients)):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[place] = leaves[place] + sign * step * direction
            ends.append(expected(tree.unflatten(moved)))
        slope = (ends[0] - ends[1]) / (2 * step)
        found, size = float(np.sum(gradient * direction)), np.linalg.norm(gradient)
        assert abs(found - slope) < 1e-4 * (1 + size * np.linalg.norm(direction)), path
        assert size > 1e-3, path


def test_dropout_is_where_it_was_published(params, monkeypatch):
    """On attention weights, hidden units and the front end's output before the positions."""

    def gain(x, rate, keys):
        return x * GAIN if rate and keys is not None else x

    monkeypatch.setattr(layers, "dropout", gain)
    config = TransformerConfig(**SIZES, **PUBLISHED, dropout=0.3)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    scores, _ = jax.jit(Transformer(config).apply)({"params": params}, FEATURES, LENGTHS, keys)
    expected = oracle(double(params), FEATURES[0], LENGTHS[0], gain=GAIN)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-4)


def largest(init, shape=(5000,)):
    x = np.asarray(init(jax.random.key(0), shape, jnp.float32))
    return np.abs(x).max()


def test_front_end_and_output_begin_as_published():
    begin = {}
    for init in ("third", "lecun"):
        config = TransformerConfig(vocab=30, features=20, dim=64, blocks=0, mlp=8, init=init)
        begin[init] = Transformer(config).init(
            jax.random.key(1), jnp.zeros((1, 3, 20)), jnp.full(1, 3)
        )["params"]
    for name, fan_in in (("front_end", 140), ("output", 64)):
        small, large = (begin[init][name] for init in ("third", "lecun"))
        bound = 1 / np.sqrt(fan_in)
        for part, scale in ((small["kernel"], 1.0), (large["kernel"], np.sqrt(3))):
            assert np.abs(part).max() == pytest.approx(scale * bound, rel=0.02)
            assert np.std(part) == pytest.approx(scale * bound / np.sqrt(3), rel=0.05)
        assert not small["bias"].any() and np.unique(large["bias"]).size == large["bias"].size
        assert 0.8 * bound < np.abs(large["bias"]).max() <= bound
    assert largest(layers.uniform_bias(100)) == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("stream", ["", "float32"])
def test_front_end_and_residual_stream_stay_in_float32(monkeypatch, stream):
    seen = []

    def record(function):
        @functools.wraps(function)
        def wrapped(block, remat, x, *rest):
            seen.append(x.dtype)
            return function(block, remat, x, *rest)

        return wrapped

    monkeypatch.setattr(encoder_blocks, "apply_block", record(encoder_blocks.apply_block))
    patches = layers.patches
    monkeypatch.setattr(
        layers, "product", lambda x, kernel: seen.append(x.dtype) or patches_product(x, kernel)
    )
    config = TransformerConfig(**SIZES, dtype="bfloat16", stream_dtype=stream, front_end="same")
    weights = random_weights(config)
    seen.clear()
    scores, _ = jax.eval_shape(
        Transformer(config).apply, {"params": weights}, FEATURES.astype(np.float32), LENGTHS
    )
    wide = jnp.float32 if stream else jnp.bfloat16
    assert scores.dtype == jnp.float32 and patches is layers.patches
    assert seen[0] == wide  # windows
    assert seen.count(jnp.dtype(jnp.bfloat16)) >= 9  # blocks' and the output's products
    of_blocks = [x for x in seen if x == wide]
    assert len(of_blocks) >= 3  # windows, and what two blocks are given


def patches_product(x, kernel):
    return jnp.matmul(x, kernel)


def drops(monkeypatch, per, parts=2):
    """The keys that the blocks' layer drop draws from, in each part of a batch [parts, blocks]."""
    seen = []

    def record(new, old, rate, keys, index):
        if keys is not None:  # not when the model is made
            seen.append(jax.random.key_data(jax.random.fold_in(keys[0], index)))
        return new

    monkeypatch.setattr(encoder_blocks, "drop_block", record)
    config = TransformerConfig(**SIZES, layer_drop=0.5, layer_drop_per=per)
    model = recogniser.ctc_recogniser(Transformer(config), config.features)
    params = random_weights(config)
    batch = {
        "features": FEATURES.astype(np.float32),
        "features_length": LENGTHS,
        "labels": np.ones((2, 1), np.int32),
        "labels_length": np.ones(2, np.int32),
        "mask": np.ones(2, bool),
    }

    @jax.jit
    def keys_of(step, part):
        seen.clear()
        # As `batch_gradient` calls it.
        more = {"batch_key": step} if per == "batch" else {}
        model.loss(params, batch | more, jax.random.fold_in(step, part))
        return jnp.stack(seen)

    return np.stack([keys_of(jax.random.key(7), part) for part in range(parts)])


def test_all_parts_of_a_batch_drop_the_same_blocks(monkeypatch):
    monkeypatch.setattr(recogniser, "ctc_loss", lambda x, *_: (x.sum((1, 2)), x[:, 0, 0] == 0))
    alike, apart = drops(monkeypatch, "batch"), drops(monkeypatch, "part")
    assert alike.shape[:2] == (2, CONFIG.blocks)
    np.testing.assert_array_equal(alike[0], alike[1])
    assert (alike[0, 0] != alike[0, 1]).any() and (apart[0] != apart[1]).any()


def test_choices_are_checked():
    for name in ("front_end", "init", "layer_drop_per", "stream_dtype"):
        assert name in module._CHOICES
        with pytest.raises(layers.UserError, match=name):
            TransformerConfig(**SIZES, **{name: "other"})
