"""The kernels for accelerators, interpreted on the CPU, are the loop that everybody else has."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.kernels import ctc, ctc_accelerated, devices

KINDS = ("tpu", "gpu")
V = 7


@pytest.fixture
def accelerated(by_kernel):
    return by_kernel(ctc_accelerated, ctc.ctc_loss)


def batch(b, t, u, seed=0, scale=3.0):
    """Feasible and infeasible ones, empty labels, no frames, and padding that is not finite."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((b, t, V)) * scale).astype(np.float32)
    labels = rng.integers(1, V, (b, u)).astype(np.int32)
    frames = rng.integers(u, t + 1, b).astype(np.int32)
    counts = rng.integers(1, max(2, u // 2), b).astype(np.int32)
    frames[0], counts[0] = t, u
    frames[1], counts[1] = max(u - 1, 0), u  # fewer frames than labels
    counts[2] = 0
    frames[3], counts[3] = 0, 0
    for i in range(b):
        logits[i, frames[i] :] = np.nan
    return logits, frames, labels, counts


@pytest.mark.parametrize(("kind", "states"), [("tpu", 128), ("gpu", 13), ("", 13)])
def test_a_tpu_is_given_as_many_states_as_fill_its_registers(kind, states, monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: kind)
    labels = jnp.ones((2, 6), jnp.int32)
    assert ctc._emissions(jnp.zeros((2, 9, V)), labels).shape == (2, 9, states)


def in_float64(logits, frames, labels, counts):
    """The forward and backward variables of one utterance, equations 6 to 14: loss, posteriors."""
    with jax.enable_x64(True):

        def loss(logits):
            return ctc.reference(
                logits[None], np.array([frames]), labels[None], np.array([counts])
            )[0]

        return jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_loops(accelerated, kind):
    """Of nine utterances: a TPU has eight in a block, and the second has padding."""
    args = batch(9, 21, 6)
    (_, (loss, feasible)), gradient = accelerated(kind)(*args)
    (_, (expected, same)), by_loop = accelerated("")(*args)
    np.testing.assert_array_equal(feasible, same)
    assert not feasible[1] and feasible[2] and feasible[3]
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, by_loop, atol=2e-6)
    assert loss[1] == loss[3] == 0 and not gradient[1].any() and not gradient[3].any()
    for i in range(9):
        assert not gradient[i, args[1][i] :].any()
    value, exact = in_float64(np.nan_to_num(args[0][4]), args[1][4], args[2][4], args[3][4])
    np.testing.assert_allclose(loss[4], value, rtol=1e-6)
    np.testing.assert_allclose(gradient[4], exact, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_500_frames_with_few_and_with_many_labels(accelerated, kind, monkeypatch):
    """The TPU's in parts of frames, the last of which is not full."""
    monkeypatch.setattr(ctc_accelerated, "_BLOCK", 48 * 8 * 512)
    args = batch(4, 500, 200, scale=2.0)
    (_, (loss, _)), gradient = accelerated(kind)(*args)
    (_, (expected, _)), by_loop = accelerated("")(*args)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, by_loop, atol=2e-5)
    np.testing.assert_allclose(np.nansum(gradient, axis=-1), 0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_side_by_side_are_one_batch(accelerated, kind):
    many = [batch(4, 12, 3, seed) for seed in range(3)]
    stacked = [np.stack(arrays) for arrays in zip(*many, strict=True)]
    run = accelerated(kind)
    text = str(jax.make_jaxpr(jax.vmap(run))(*stacked))
    assert text.count("pallas_call") == (2 if kind == "tpu" else 1)
    (_, (loss, _)), gradient = jax.vmap(run)(*stacked)
    (_, (expected, _)), by_loop = jax.vmap(accelerated(""))(*stacked)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, by_loop, atol=2e-6)


def test_kernels_are_for_devices_that_are_divided_by_hand(monkeypatch):
    seen = []

    def note(x):
        seen.append(devices.platform())
        return x

    manual = jax.sharding.AxisType.Manual

    def within(kind, platform, types_=(manual,), empty=False):
        device = types.SimpleNamespace(device_kind=kind, platform=platform)
        mesh = types.SimpleNamespace(empty=empty, axis_types=types_, abstract_device=device)
        monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
        return devices.platform()

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.PartitionSpec()
    jax.jit(note)(1.0)
    jax.jit(jax.shard_map(note, mesh=mesh, in_specs=spec, out_specs=spec))(1.0)
    assert seen == ["", ""]  # not on a CPU
    assert within("TPU v5 lite", "tpu") == "tpu"
    assert within("TPU v5 lite", "tpu", (manual, jax.sharding.AxisType.Auto)) == ""
    assert within("TPU v5 lite", "tpu", (), True) == ""
    assert within("NVIDIA H100 80GB HBM3", "gpu") == within("NVIDIA H200", "cuda") == "gpu"
    assert devices.for_layers() == ""
    for old in ("Tesla T4", "Tesla V100-SXM2-16GB", "gfx942"):
        assert within(old, "gpu") == ""
    rooms = {"TPU v5 lite": "tpu", "TPU v5": "tpu", "TPU v5p": "tpu", "TPU v6 lite": "tpu"}
    rooms |= {"TPU7x": "tpu", "TPU v4": "", "TPU v4 lite": "", "TPU v3": "", "TPU v2": ""}
    for kind, of_layers in rooms.items():
        assert within(kind, "tpu") == "tpu" and devices.for_layers() == of_layers
    assert within("TPU v6 lite", "tpu", (), True) == devices.for_layers() == ""
