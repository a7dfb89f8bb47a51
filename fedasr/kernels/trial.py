"""Whether a device's own kernels compute on it what everybody else's code does: tried, not assumed.

A kernel for accelerators goes by another compiler than the rest of a program, and may meet a
driver, a release or a device that it was never tried on. Where one fails or differs none is used,
which is said; the results of a run then are everybody's.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.kernels import (
    attention_accelerated,
    block_accelerated,
    ctc,
    devices,
    frontend_accelerated,
    norm_accelerated,
    rnnt,
)

Array = jax.Array
_TOLERANCE = 1e-3  # of gradients, which are at most 1, and of losses in shares
_ROUNDING = 0.03  # of bfloat16, in shares of the largest number
_REPEATS = 3  # since what is wrong in the order of memory is not wrong always


def try_kernels(device: jax.Device) -> str:
    """Compares a device's kernels with what others have, once for each kind of device in a process.

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
        f"the kernels for accelerators are not used on {device.device_kind} ({reason}): what "
        "others have is, which is slower",
        stacklevel=2,
    )


def _difference(device: jax.Device) -> str:
    """What a kernel does other than it should; "" for nothing."""
    ways = _of_losses, _of_attention, _of_norm, _of_block, _of_front_end
    return next((found for way in ways if (found := way(device))), "")


def _by_hand(device: jax.Device, function: Any) -> Any:
    """The function compiled for a device as if it were one of several, each with its own."""
    mesh = jax.sharding.Mesh(np.array([device]), ("devices",))
    spec = jax.sharding.PartitionSpec()
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


def _of_losses(device: jax.Device) -> str:
    """CTC's and the transducer's."""
    for name, loss, sizes in (
        ("CTC", ctc.ctc_loss, (9, 40, 6)),
        ("CTC", ctc.ctc_loss, (3, 200, 70)),
        ("RNN-T", rnnt.rnnt_loss, (9, 30, 20)),
        ("RNN-T", rnnt.rnnt_loss, (3, 90, 140)),
    ):
        args = jax.device_put(_batch(name, *sizes), device)

        def total(logits: Array, *rest: Array, loss: Any = loss) -> Array:
            found: Array = loss(logits, *rest)[0].sum()
            return found

        gradient = jax.value_and_grad(total)
        by_kernel, by_loop = _by_hand(device, gradient), jax.jit(gradient)
        expected = jax.device_get(by_loop(*args))
        for _ in range(_REPEATS):
            value, slopes = jax.device_get(by_kernel(*args))
            most = float(np.abs(slopes - expected[1]).max())
            share = float(abs(value - expected[0]) / abs(expected[0]))
            if not max(most, share) < _TOLERANCE:
                return f"its {name} gradients differ by up to {most:.2g}, losses by {share:.2g}"
    return ""


def _compared(device: jax.Device, name: str, kernel: Any, plain: Any, args: tuple) -> str:
    """Whether two functions' results differ by more than half precision's rounding."""
    by_kernel, args = _by_hand(device, kernel), jax.device_put(args, device)
    expected = jax.device_get(jax.tree.leaves(jax.jit(plain)(*args)))
    for _ in range(_REPEATS):
        found = jax.device_get(jax.tree.leaves(by_kernel(*args)))
        for a, b in zip(found, expected, strict=True):
            a, b = a.astype(np.float32), b.astype(np.float32)
            if not float(np.abs(a - b).max()) <= _ROUNDING * float(np.abs(b).max()):
                return f"the {name}'s kernel differs by up to {float(np.abs(a - b).max()):.2g}"
    return ""


def _of_attention(device: jax.Device) -> str:
    b, t, heads, e, rate = 2, 200, 2, 48, 0.3
    kind = devices.kind_of(device)
    if not attention_accelerated.fits(kind, t, heads * e, heads):
        return ""
    rng = np.random.default_rng(1)
    plan = attention_accelerated.Plan(kind, heads, rate)
    qkv = jnp.asarray(rng.standard_normal((b, t, 3 * heads * e)), jnp.bfloat16)
    lengths = jnp.asarray([t, t - 77], jnp.int32)
    true = jnp.arange(t) < lengths[:, None]
    slopes = jnp.where(true[..., None], rng.standard_normal((b, t, heads * e)), 0)
    words = jnp.asarray(rng.integers(0, 2**32, (b, 2), np.uint32))

    def with_slopes(function: Any) -> Any:
        def both(qkv: Array, slopes: Array, lengths: Array, words: Array) -> Any:
            out, pull = jax.vjp(lambda x: function(x, lengths, words), qkv)
            return jnp.where(true[..., None], out, 0), pull(slopes.astype(out.dtype))[0]

        return both

    return _compared(
        device,
        "attention",
        with_slopes(lambda *args: attention_accelerated.attention(plan, *args)),
        with_slopes(lambda *args: attention_accelerated.reference(plan, *args)),
        (qkv, slopes, lengths, words),
    )


def _of_norm(device: jax.Device) -> str:
    d = 144
    if not norm_accelerated.fits(devices.kind_of(device), d):
        return ""
    rng = np.random.default_rng(2)
    x, direct, slopes = (jnp.asarray(rng.standard_normal((3, 70, d)), jnp.float32) for _ in "123")
    branch = jnp.asarray(rng.standard_normal(x.shape), jnp.bfloat16)
    scale, bias = (jnp.asarray(rng.standard_normal(d), jnp.float32) for _ in "12")

    def with_slopes(function: Any) -> Any:
        def both(*args: Array) -> Any:
            *inputs, direct, slopes = args
            out, pull = jax.vjp(function, *inputs)
            return out, pull((direct, slopes))

        return both

    keep, dtype = jnp.float32(0.5), jnp.dtype("float32")

    def kernel(x: Array, branch: Array, scale: Array, bias: Array) -> Any:
        factors = norm_accelerated.factors(scale, bias)
        total, out = norm_accelerated.add_norm(dtype, False, x, branch, keep, factors)
        return total, out + norm_accelerated.norm(dtype, False, total, factors)

    def plain(x: Array, branch: Array, *rest: Array) -> Any:
        total, out = norm_accelerated.plain_add_norm(dtype, x, branch, keep, *rest)
        return total, out + norm_accelerated.plain_add_norm(dtype, total, None, keep, *rest)[1]

    args = (x, branch, scale, bias, direct, slopes)
    return _compared(device, "layer norm", with_slopes(kernel), with_slopes(plain), args)


def _of_block(device: jax.Device) -> str:
    b, t, d, hidden = 2, 70, 48, 96
    plan = block_accelerated.Plan(3, jnp.dtype("bfloat16"), 0.3, 0.3)
    kind = devices.kind_of(device)
    if not (devices.has_room(device) and block_accelerated.fits(kind, plan, t, d, hidden)):
        return ""
    rng = np.random.default_rng(3)

    def matrix(rows: int, columns: int) -> Array:
        return jnp.asarray(rng.standard_normal((rows, columns)) / rows**0.5, jnp.float32)

    # Far from the ReLU's kink, where rounding would decide.
    signs = np.where(np.arange(hidden) % 2, 1.0, -1.0)
    up = jnp.asarray(signs * (1 + 0.2 * rng.standard_normal((d, hidden))) / d, jnp.float32)
    norms = jnp.repeat(jnp.asarray([[1.0], [0.2], [0.1], [0.5]]), d, axis=1)
    weights = block_accelerated.Weights(
        norms, matrix(d, 3 * d), matrix(d, d), up, matrix(hidden, d).T
    )
    x = jnp.asarray(rng.standard_normal((b, t, d)), jnp.bfloat16)
    lengths = jnp.asarray([t, t - 27], jnp.int32)
    slopes = jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    slopes = jnp.where((jnp.arange(t) < lengths[:, None])[..., None], slopes, 0)
    words = jnp.asarray(rng.integers(-(2**31), 2**31, (b, 8)), jnp.int32)
    given = jnp.concatenate([lengths[:, None], jnp.ones((b, 1), jnp.int32), words], axis=1)

    def with_slopes(function: Any) -> Any:
        def both(weights: Any, x: Array, slopes: Array, given: Array) -> Any:
            out, pull = jax.vjp(lambda *args: function(plan, *args, given), weights, x)
            true = (jnp.arange(t) < given[:, :1])[..., None]
            return jnp.where(true, out, 0), pull(slopes.astype(out.dtype))

        return jax.vmap(both)

    return _compared(
        device,
        "block",
        with_slopes(block_accelerated.block),
        with_slopes(block_accelerated.reference),
        _of_two_clients(weights, x, slopes, given),
    )


def _of_front_end(device: jax.Device) -> str:
    ways = (_of_front_end_in(device, dtype) for dtype in ("bfloat16", "float32"))
    return next((found for found in ways if found), "")


def _of_front_end_in(device: jax.Device, dtype: str) -> str:
    b, t, f, d = 2, 100, 40, 48
    rng = np.random.default_rng(4)
    plan = frontend_accelerated.Plan(7, 3, 3, jnp.dtype(dtype))
    kernel = rng.standard_normal((7 * f, 2 * d)) / (7 * f) ** 0.5
    arrays = np.array([1.3, -0.2]), kernel, 0.3 * rng.standard_normal(2 * d)
    weights = frontend_accelerated.Weights(*(jnp.asarray(x, jnp.float32) for x in arrays))
    kind = devices.kind_of(device)
    if not (devices.has_room(device) and frontend_accelerated.fits(kind, plan, weights, t, f)):
        return ""
    features = jnp.asarray(3 + 2 * rng.standard_normal((b, t, f)), jnp.float32)
    slopes = jnp.asarray(rng.standard_normal((b, plan.windows(t), d)), dtype)

    def with_slopes(function: Any) -> Any:
        def both(weights: Any, features: Array, lengths: Array, slopes: Array) -> Any:
            out, pull = jax.vjp(lambda weights: function(plan, weights, features, lengths), weights)
            return out, pull(slopes)

        return jax.vmap(both)

    return _compared(
        device,
        "front end",
        with_slopes(frontend_accelerated.gated),
        with_slopes(frontend_accelerated.reference),
        _of_two_clients(weights, features, jnp.asarray([t, t - 33], jnp.int32), slopes),
    )


def _of_two_clients(weights: Any, *args: Array) -> tuple:
    """One client's arrays, and those of a second with other weights and utterances in turn."""
    theirs = jax.tree.map(lambda w: jnp.stack([w, -0.8 * w]), weights)
    return theirs, *(jnp.stack([x, x[::-1]]) for x in args)


def _batch(name: str, size: int, frames: int, labels: int) -> tuple[np.ndarray, ...]:
    """Logits, frames, labels and counts, as `ctc.ctc_loss` or `rnnt.rnnt_loss` takes them."""
    rng = np.random.default_rng(0)
    shape = (size, frames, 30) if name == "CTC" else (size, frames, labels + 1, 7)
    logits = 3 * rng.standard_normal(shape, np.float32)
    lengths = rng.integers(frames // 2, frames + 1, size).astype(np.int32)
    return (
        logits,
        lengths,
        rng.integers(1, shape[-1], (size, labels)).astype(np.int32),
        rng.integers(1, labels // 2, size).astype(np.int32),
    )
