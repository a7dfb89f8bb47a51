"""The kernels for accelerators, interpreted on the CPU, are the loop over diagonals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels import rnnt, rnnt_accelerated

KINDS = ("tpu", "gpu")
V = 5


@pytest.fixture
def accelerated(by_kernel):
    return by_kernel(rnnt_accelerated, rnnt.rnnt_loss)


def batch(b, t, u, seed=0, scale=3.0):
    """Whole ones, some without labels, without frames, of one frame, and padding of NaN."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((b, t, u + 1, V)) * scale).astype(np.float32)
    labels = rng.integers(1, V, (b, u)).astype(np.int32)
    frames = rng.integers(1, t + 1, b).astype(np.int32)
    counts = rng.integers(0, u + 1, b).astype(np.int32)
    frames[0], counts[0] = t, u
    counts[1] = 0
    frames[2] = 0
    frames[3], counts[3] = 1, u
    for i in range(b):
        logits[i, frames[i] :] = np.nan
        logits[i, :, counts[i] + 1 :] = np.nan
    return logits, frames, labels, counts


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_loops(accelerated, kind):
    """Of nine utterances: a TPU has eight in a block, and the second has padding."""
    args = batch(9, 14, 5)
    (_, (loss, feasible)), gradient = accelerated(kind)(*args)
    (_, (expected, same)), by_loop = accelerated("")(*args)
    np.testing.assert_array_equal(feasible, same)
    assert not feasible[2] and feasible[1] and feasible[3]
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, by_loop, atol=2e-6)
    assert loss[2] == 0 and not gradient[2].any()
    for i in range(9):
        assert not gradient[i, args[1][i] :].any() and not gradient[i, :, args[3][i] + 1 :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_float64(accelerated, kind):
    """Equation 16, one point of the lattice after the other."""
    args = [x[:4] for x in batch(9, 10, 4, seed=4)]
    (_, (loss, _)), gradient = accelerated(kind)(*args)
    with jax.enable_x64(True):

        def total(logits):
            losses = rnnt.reference(logits, *args[1:])
            return losses.sum(), losses

        # The reference reads no padding.
        logits = jnp.asarray(np.nan_to_num(args[0]), jnp.float64)
        (_, expected), exact = jax.value_and_grad(total, has_aux=True)(logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, exact, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_long_ones_in_parts(accelerated, kind, monkeypatch):
    """200 frames of 80 labels, a TPU's in parts of diagonals, the last of which is not full."""
    monkeypatch.setattr(rnnt_accelerated, "_BLOCK", 48 * 8 * 128)
    args = batch(4, 200, 80, scale=2.0)
    (_, (loss, _)), gradient = accelerated(kind)(*args)
    (_, (expected, _)), by_loop = accelerated("")(*args)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, by_loop, atol=3e-5)
    np.testing.assert_allclose(np.nansum(gradient, axis=-1), 0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_side_by_side_are_one_batch(accelerated, kind):
    many = [batch(4, 8, 3, seed) for seed in range(3)]
    stacked = [np.stack(arrays) for arrays in zip(*many, strict=True)]
    run = accelerated(kind)
    text = str(jax.make_jaxpr(jax.vmap(run))(*stacked))
    assert text.count("pallas_call") == (2 if kind == "tpu" else 1)
    (_, (loss, _)), gradient = jax.vmap(run)(*stacked)
    (_, (expected, _)), by_loop = jax.vmap(accelerated(""))(*stacked)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, by_loop, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_diagonal_is_left_once(kind):
    """Shares of a diagonal's moves add up to 1, behind the last to 0."""
    rng = np.random.default_rng(1)
    blank, label = (jnp.asarray(rng.standard_normal((3, 9, 4)), jnp.float32) for _ in "12")
    ends = jnp.where(jnp.arange(4) == jnp.asarray([[3], [0], [2]]), 0.0, -1e30)
    moves = jnp.asarray([9, 6, 2], jnp.int32)
    total, *shares = rnnt_accelerated.posteriors(kind, blank, label, ends, moves, interpret=True)
    left = sum(np.asarray(x).sum(axis=2) for x in shares)
    inside = np.arange(9) < np.asarray(moves)[:, None]
    np.testing.assert_allclose(left, inside, atol=1e-6)
    assert np.isfinite(total).all()
    np.testing.assert_allclose(total[1], blank[1, :6, 0].sum(), rtol=1e-6)  # the only path
    np.testing.assert_allclose(total[2], label[2, 0, 0] + label[2, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_of_probability_zero_are_not_made(kind):
    blank = jnp.full((1, 3, 2), -1.0).at[0, 1, 1].set(-jnp.inf)
    label = jnp.full((1, 3, 2), -2.0).at[0, 0, 0].set(-jnp.inf).at[0, 1, 0].set(-3.0)
    ends, moves = jnp.asarray([[-1e30, 0.0]]), jnp.asarray([3])
    total, of_blank, of_label = rnnt_accelerated.posteriors(
        kind, blank, label, ends, moves, interpret=True
    )
    ways = [-1 - 3 - 1, -1 - 1 - 2]  # the label second or third
    np.testing.assert_allclose(total[0], np.logaddexp(*ways), rtol=1e-6)
    assert of_label[0, 0, 0] == of_blank[0, 1, 1] == 0 and of_blank[0, 0, 0] == 1
