import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.models import objectives
from fedasr.models import recogniser as recogniser_module
from fedasr.models.recogniser import ctc_recogniser, make_recogniser
from fedasr.models.transformer import TransformerConfig

OPTIONS = {"vocab": 6, "features": 8, "dim": 16, "blocks": 1, "heads": 2, "mlp": 16}
# Compiling is what takes the time here.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Echo:
    """A "model" whose scores are its input frames plus a trained bias; it records its keys."""

    def __init__(self):
        self.keys = []

    def init(self, key, features, lengths):
        return {"params": jnp.zeros(features.shape[-1])}

    def apply(self, variables, features, lengths, keys=None):
        self.keys.append(keys)
        return features + variables["params"], lengths


def batch(mask=(True, True, True), seed=0):
    """Three utterances; the second has more labels than frames."""
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(3, 7, 8)).astype(np.float16),
        "features_length": np.int32([7, 3, 6]),
        "labels": np.int32([[1, 2, 3, 0], [1, 2, 2, 4], [5, 5, 0, 0]]),
        "labels_length": np.int32([3, 4, 2]),
        "mask": np.array(mask),
    }


@pytest.fixture(scope="module")
def gradient():
    echo = ctc_recogniser(Echo(), 8)
    return jax.jit(jax.value_and_grad(echo.loss, has_aux=True))


def test_infeasible_and_masked_utterances_do_not_count(gradient):
    params, key = np.linspace(-1, 1, 8).astype(np.float32), jax.random.key(0)
    (loss, aux), grads = gradient(params, batch(), key)
    assert aux == {"utterances": 2, "infeasible": 1}
    assert np.abs(grads).max() > 1e-2
    # The mean of the two that count, each alone.
    first = gradient(params, batch((True, False, False)), key)
    third = gradient(params, batch((False, False, True)), key)
    assert first[0][1] == third[0][1] == {"utterances": 1, "infeasible": 0}
    assert loss == pytest.approx(float(first[0][0] + third[0][0]) / 2, rel=1e-5)
    np.testing.assert_allclose(grads, (first[1] + third[1]) / 2, rtol=1e-4, atol=1e-6)
    # Whatever they hold.
    garbage = batch((True, False, False))
    garbage["features"][1:] = 50.0
    garbage["labels_length"][1:] = 1
    same = gradient(params, garbage, key)
    assert same[0][0] == pytest.approx(float(first[0][0]), rel=1e-6)
    np.testing.assert_allclose(same[1], first[1], rtol=1e-5, atol=1e-7)


def test_nothing_to_learn_from_has_no_gradient(gradient):
    params, key = np.zeros(8, np.float32), jax.random.key(0)
    for mask, aux in [
        ((False, True, False), {"utterances": 0, "infeasible": 1}),
        ((False, False, False), {"utterances": 0, "infeasible": 0}),
    ]:
        (loss, counts), grads = gradient(params, batch(mask), key)
        assert loss == 0 and counts == aux and not np.any(grads)


def test_evaluate_decodes_greedily():
    frames = [[1, 1, 0, 1, 2, 2, 0], [0, 0, 3, 3, 3, 5, 5], [4, 4, 4, 4, 0, 0, 0]]
    data = batch((True, True, False)) | {"features": 5 * np.eye(8, dtype=np.float16)[frames]}
    data["features_length"] = np.int32([7, 3, 7])
    tokens, counts, loss, valid = ctc_recogniser(Echo(), 8).evaluate(np.zeros(8), data)
    assert [list(t[:n]) for t, n in zip(tokens, counts, strict=True)] == [[1, 1, 2], [3], [4]]
    np.testing.assert_array_equal(valid, [True, False, False])
    assert loss[0] > 0 and not np.any(loss[1:])


def test_model_and_augmentation_share_no_randomness(monkeypatch):
    """Two draws from one key would be the same numbers."""
    augmented = []
    monkeypatch.setattr(
        objectives,
        "spec_augment",
        lambda x, n, k, c: jax.debug.callback(augmented.append, jax.random.key_data(k)) or x,
    )
    echo = Echo()
    model = ctc_recogniser(echo, 8, SpecAugmentConfig())
    model.loss(np.zeros(8, np.float32), batch(), jax.random.key(0))
    jax.effects_barrier()
    augmented = {tuple(np.asarray(k).tolist()) for k in augmented}
    (given,) = echo.keys
    used = [given] + [jax.vmap(lambda k: jax.random.fold_in(k, i))(given) for i in range(12)]  # noqa: B023
    used = {tuple(k) for keys in used for k in jax.random.key_data(keys).tolist()}
    assert len(augmented) == 3 and len(used) == 3 * 13
    assert not augmented & used


def test_the_augmentation_is_random_by_key():
    config = SpecAugmentConfig(frequency_masks=2, frequency_width=4)
    loss = jax.jit(ctc_recogniser(Echo(), 8, config).loss)
    losses = [float(loss(np.zeros(8), batch(), jax.random.key(s))[0]) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_recogniser_by_name_has_the_options_given():
    shapes = jax.eval_shape(make_recogniser("transformer", OPTIONS).init, jax.random.key(0))
    assert shapes["output"]["kernel"].shape == (16, 6)
    assert shapes["front_end"]["kernel"].shape == (7 * 8, 32)


def test_unknown_model_and_option():
    with pytest.raises(UserError, match=r"'listener'.*conformer.*transformer"):
        make_recogniser("listener", {})
    with pytest.raises(UserError, match=r"no option \['depth'\].*blocks"):
        make_recogniser("transformer", {"depth": 3})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "conformer"])
def test_gradient_checkpointing_saves_memory_and_changes_nothing_else(name):
    config_type, module = recogniser_module.MODELS[name]
    config = config_type(**OPTIONS | {"blocks": 2, "mlp": 64})
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 400, 8)).astype(np.float32)
    lengths = np.int32([400, 300, 50])
    shapes, memory, results = {}, {}, {}
    for remat in ("none", "block"):
        model = module(dataclasses.replace(config, remat=remat))

        def total(params):
            logits, _ = model.apply({"params": params}, features, lengths)  # noqa: B023
            return jnp.mean(logits * jnp.sin(jnp.arange(logits.size)).reshape(logits.shape))

        shapes[remat] = jax.eval_shape(model.init, jax.random.key(0), features, lengths)["params"]
        if not results:
            params = jax.tree.map(
                lambda x: np.float32(rng.uniform(-0.3, 0.3, x.shape)), shapes[remat]
            )
        gradient = jax.jit(jax.value_and_grad(total), compiler_options=COMPILER)
        compiled = gradient.lower(params).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        results[remat] = compiled(params)
    assert shapes["none"] == shapes["block"]
    assert memory["block"] < 0.8 * memory["none"]
    value, gradients = results["none"]
    assert value == pytest.approx(float(results["block"][0]), rel=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (gradients, results["block"][1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("sizes", [{"dim": 10, "heads": 4}, {"dim": 9, "heads": 3}])
def test_sizes_that_do_not_fit_together(sizes):
    with pytest.raises(UserError, match="dim"):
        TransformerConfig(**sizes)
