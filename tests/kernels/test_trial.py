"""A kernel that fails or differs on a device is noticed, and not used there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.federated.hardware import Hardware
from fedasr.kernels import (
    attention_accelerated,
    block_accelerated,
    ctc_accelerated,
    devices,
    frontend_accelerated,
    norm_accelerated,
    rnnt_accelerated,
    trial,
)


@pytest.fixture
def kind():
    return "gpu"


@pytest.fixture
def device(monkeypatch, kind):
    """A CPU that passes for a GPU, or `kind`, whose kernels are interpreted."""
    monkeypatch.setattr(devices, "TRIED", {})
    monkeypatch.setattr(devices, "kind_of", lambda device: kind)
    monkeypatch.setattr(devices, "has_room", lambda device: kind == "tpu")
    monkeypatch.setattr("fedasr.federated.hardware.kind_of", lambda device: kind)
    for walks in (ctc_accelerated, rnnt_accelerated):
        interpreted = functools.partial(walks.posteriors, interpret=True)
        monkeypatch.setattr(walks, "posteriors", interpreted)
    for kernels in (attention_accelerated, block_accelerated, frontend_accelerated):
        plan = functools.partial(kernels.Plan, interpret=True)
        monkeypatch.setattr(kernels, "Plan", plan)
    for name in ("add_norm", "norm"):
        real = getattr(norm_accelerated, name)
        monkeypatch.setattr(
            norm_accelerated, name, lambda dtype, _, *args, real=real: real(dtype, True, *args)
        )
    return jax.devices()[0]


def used(device):
    """The kind of kernel that a program for the device gets."""
    seen = []

    def note(x):
        seen.append(devices.platform())
        return x

    mesh, spec = jax.sharding.Mesh(np.array([device]), ("x",)), jax.sharding.PartitionSpec()
    jax.jit(jax.shard_map(note, mesh=mesh, in_specs=spec, out_specs=spec)).trace(1.0)
    return seen[0]


def test_a_kernel_that_is_right_is_used(device, recwarn):
    Hardware(devices=[device]).tried_mesh()
    assert devices.TRIED == {device.device_kind: ""} and used(device) == "gpu"
    assert not recwarn.list


def differs(real):
    """Off in one frame of one utterance, as by a race."""

    def posteriors(*args):
        after, found, *more = real(*args)
        return after, found.at[1, 3].multiply(0.9), *more

    return posteriors


def fails(real):
    def posteriors(*args):
        raise RuntimeError("no such\ninstruction")

    return posteriors


@pytest.mark.parametrize(
    ("walks", "broken", "said"),
    [
        (ctc_accelerated, differs, "its CTC gradients differ by up to"),
        (rnnt_accelerated, differs, "its RNN-T gradients differ by up to"),
        (ctc_accelerated, fails, "it fails: no such instruction"),
    ],
)
def test_one_that_is_not_gives_way_to_the_loop(device, monkeypatch, walks, broken, said):
    monkeypatch.setattr(walks, "posteriors", broken(walks.posteriors))
    with pytest.warns(UserWarning, match=f"not used on .*{said}"):
        Hardware(devices=[device]).tried_mesh()
    assert used(device) == ""


def test_attention_and_norms_are_tried_too(device, monkeypatch):
    """One frame's weights are off; one row's sum is."""
    real = attention_accelerated.attention
    with monkeypatch.context() as patch:
        patch.setattr(attention_accelerated, "attention", lambda *a: real(*a).at[0, 5].add(0.5))
        assert "the attention's kernel differs" in trial.try_kernels(device)
    devices.TRIED.clear()
    both, alone = norm_accelerated.add_norm, norm_accelerated.norm

    def off(out):
        return out + jnp.zeros_like(out).at[0, 3].set(0.5)

    def one_row_off(*args):
        total, out = both(*args)
        return total, off(out)

    for name, wrong in (("add_norm", one_row_off), ("norm", lambda *args: off(alone(*args)))):
        devices.TRIED.clear()
        with monkeypatch.context() as patch:
            patch.setattr(norm_accelerated, name, wrong)
            assert "the layer norm's kernel differs" in trial.try_kernels(device)


@pytest.mark.parametrize("kind", ["tpu"])
@pytest.mark.parametrize(
    ("kernels", "name", "said"),
    [(block_accelerated, "block", "block"), (frontend_accelerated, "gated", "front end")],
)
def test_blocks_and_front_ends_are_tried_too(device, monkeypatch, kernels, name, said):
    """One frame of one utterance is off."""
    assert trial.try_kernels(device) == ""
    real = getattr(kernels, name)
    devices.TRIED.clear()
    monkeypatch.setattr(kernels, name, lambda *args: real(*args).at[1, 5].add(0.5))
    assert f"the {said}'s kernel differs" in trial.try_kernels(device)


def test_nothing_is_tried_where_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(trial, "_difference", lambda device: pytest.fail("tried"))
    assert trial.try_kernels(jax.devices()[0]) == ""
