"""Whether a device's own kernels compute on it what everybody else's loop does: tried, not assumed.

A kernel for accelerators goes by another compiler than the rest of a program, and may meet a
driver, a release or a device that it was never tried on. One that fails or differs is not used,
which is said; the results of a run then are the loop's.
"""

import warnings

import jax
import numpy as np

from fedasr.kernels import ctc, devices

Array = jax.Array
_TOLERANCE = 1e-3  # of gradients, which are at most 1, and of losses in shares
_REPEATS = 3  # since what is wrong in the order of memory is not wrong always


def try_kernels(device: jax.Device) -> str:
    """Compares a device's CTC kernel with the loop, once for each kind of device in a process.

    Args:
      device: of this process.

    Returns:
      Why kernels are not used on devices of this kind: one that fails, or differs. "" where they
      are used, or there are none.
    """
    kind = device.device_kind
    if devices.kind_of(device) and kind not in devices.TRIED:
        try:
            devices.TRIED[kind] = _difference(device)
        except Exception as error:  # of a compiler or a driver: any
            devices.TRIED[kind] = f"it fails: {' '.join(str(error).split())[:200]}"
    return devices.TRIED.get(kind, "")


def refuse_kernels(device: jax.Device, reason: str) -> None:
    """Has devices of this kind use no kernels, and says so once.

    Args:
      device: any. reason: why; see `try_kernels`.
    """
    devices.TRIED[device.device_kind] = reason
    warnings.warn(
        f"the CTC kernel is not used on {device.device_kind} ({reason}): the loop is, which is "
        "slower",
        stacklevel=2,
    )


def _difference(device: jax.Device) -> str:
    """What the kernel does other than the loop; "" for nothing."""

    def loss(logits: Array, frames: Array, labels: Array, counts: Array) -> Array:
        return ctc.ctc_loss(logits, frames, labels, counts)[0].sum()

    gradient = jax.value_and_grad(loss)
    mesh = jax.sharding.Mesh(np.array([device]), ("devices",))
    spec = jax.sharding.PartitionSpec()
    by_kernel = jax.jit(
        jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    by_loop = jax.jit(gradient)
    for sizes in ((9, 40, 6), (3, 200, 70)):
        args = jax.device_put(_batch(*sizes), device)
        expected = jax.device_get(by_loop(*args))
        for _ in range(_REPEATS):
            value, slopes = jax.device_get(by_kernel(*args))
            most = float(np.abs(slopes - expected[1]).max())
            share = float(abs(value - expected[0]) / abs(expected[0]))
            if not max(most, share) < _TOLERANCE:
                return f"its gradients differ by up to {most:.2g}, its losses by {share:.2g}"
    return ""


def _batch(size: int, frames: int, labels: int) -> tuple[np.ndarray, ...]:
    """Logits, frames, labels and counts, as `ctc.ctc_loss` takes them."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((size, frames, 30), np.float32)
    lengths = rng.integers(frames // 2, frames + 1, size).astype(np.int32)
    return (
        logits,
        lengths,
        rng.integers(1, 30, (size, labels)).astype(np.int32),
        rng.integers(1, labels // 2, size).astype(np.int32),
    )
