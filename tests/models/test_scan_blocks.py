"""Blocks that run through one compiled block are the blocks that are compiled one by one."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.models import encoder_blocks
from fedasr.models.recogniser import make_recogniser

SIZES = {"vocab": 6, "features": 8, "dim": 16, "heads": 2, "mlp": 16, "dropout": 0.2}
MODELS = {
    "transformer": {"layer_drop": 0.4, "cape_shift": 1.0},
    "transformer published": {
        "layer_drop": 0.4, "layer_drop_per": "batch", "branch_dropout": False, "remat": "block",
    },
    "conformer": {"layer_drop": 0.4, "conv_kernel": 4, "remat": "block"},
}  # fmt: skip


def recogniser(name, **options):
    return make_recogniser(name.split()[0], SIZES | MODELS[name] | options)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "features": jnp.asarray(rng.standard_normal((3, 40, 8)), jnp.float32),
        "features_length": jnp.asarray([40, 33, 20], jnp.int32),
        "labels": jnp.asarray(rng.integers(1, 6, (3, 4)), jnp.int32),
        "labels_length": jnp.asarray([4, 3, 2], jnp.int32),
        "mask": jnp.asarray([True, True, True]),
    }


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_evaluation_are_the_same(name):
    plain, scanned = recogniser(name, blocks=3), recogniser(name, blocks=3, scan_blocks=True)
    params = plain.init(jax.random.key(1))
    again = scanned.init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    tolerance = 2e-2 if "published" in name else 1e-5
    for seed in range(3):  # of the layers dropped
        args = params, batch(), jax.random.key(seed)
        found = [jax.value_and_grad(m.loss, has_aux=True)(*args) for m in (plain, scanned)]
        (a, _), ga = found[0]
        (b, _), gb = found[1]
        np.testing.assert_allclose(a, b, rtol=tolerance)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(
                x, y, rtol=tolerance, atol=tolerance * float(jnp.abs(x).max())
            ),
            ga,
            gb,
        )
    for x, y in zip(
        plain.evaluate(params, batch()), scanned.evaluate(params, batch()), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=tolerance)


@pytest.mark.parametrize("name", ["transformer", "conformer"])
def test_the_program_does_not_grow_by_whole_blocks(name):
    def equations(blocks, scan):
        model = recogniser(name, blocks=blocks, scan_blocks=scan)
        params = jax.eval_shape(model.init, jax.random.key(0))
        args = params, batch(), jax.random.key(0)
        return str(jax.make_jaxpr(jax.grad(model.loss, has_aux=True))(*args)).count("dot_general")

    assert equations(2, True) == equations(5, True)
    assert equations(5, False) > equations(2, False)


def test_no_blocks_and_blocks_that_change_the_dtype():
    model = recogniser("transformer", blocks=0, scan_blocks=True)
    params = model.init(jax.random.key(0))
    assert np.isfinite(model.loss(params, batch(), jax.random.key(0))[0])
    with pytest.raises(UserError, match="scan_blocks"):
        recogniser(
            "transformer", scan_blocks=True, norm="post", dtype="bfloat16", stream_dtype="float32"
        )


class Counting:
    """A block that adds 1."""

    def is_initializing(self):
        return True

    def __call__(self, x, mask, keys):
        return x + 1


@pytest.mark.parametrize("batch_key", [None, jax.random.key(3)])
def test_each_block_is_dropped_by_a_draw_of_its_own(batch_key):
    config = types.SimpleNamespace(remat="none", layer_drop=0.5, scan_blocks=False)
    x, mask, keys = (
        jnp.zeros((1, 1, 1)),
        jnp.ones((1, 1), bool),
        jax.random.split(jax.random.key(0), 1),
    )
    blocks = [Counting()] * 16
    found = encoder_blocks.apply_blocks(blocks, config, x, mask, keys, (2, 4), batch_key)
    assert 3 <= float(found[0, 0, 0]) <= 13
