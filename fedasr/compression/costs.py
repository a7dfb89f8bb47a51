"""What a client receives, sends and holds under compression and partial training."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from fedasr.compression import device, online
from fedasr.compression.formats import FloatFormat
from fedasr.compression.partial import Subset
from fedasr.compression.transport import transport_bytes
from fedasr.federated.client import Loss
from fedasr.federated.subset import select
from fedasr.privacy.secure_aggregation import SecureAggregation


def describe_client(
    params: Any,
    formats: tuple[FloatFormat | None, FloatFormat | None] = (None, None),
    *,
    share: float = 0.9,
    subset: Subset | None = None,
    secure: SecureAggregation | None = None,
    local: Sequence[bool] | None = None,
    loss: Loss | None = None,
    batch: Any = None,
    grad_clip: float | None = None,
) -> list[dict[str, Any]]:
    """What a client of a run receives, sends and holds, beside one without any of it.

    Args:
      params: the model's parameters, or their shapes.
      formats: of the download and of the upload; None for float32.
      share: of the weight matrices that are compressed.
      subset: which variables clients train; None for all.
      secure: how updates are sent under secure aggregation; None without.
      local: for each variable in order, whether it stays with the client; None for none.
      loss, batch: to measure memory as well, which compiles two programs (FedSGD only): the loss
        and arrays, or shapes, of a client's batch.
      grad_clip: see `fedasr.compression.device.fedsgd_program`.

    Returns:
      Rows with `method`, `down_bytes` and `up_bytes` per client and round, `parameter_bytes` (as
      they lie on the device) and `peak_bytes`, the last two None where not measured.
    """
    sent = params if local is None else select(params, [not stays for stays in local])
    plain = transport_bytes(sent)
    rows: list[tuple[str, Any, Any, Subset | None]]
    rows = [("float32, all variables", plain, None, None)]
    if words := _in_words(formats, subset, secure):
        uploaded = None if subset is None else subset.uploaded(params)
        if uploaded is not None and local is not None:
            uploaded = [p for p, stays in zip(uploaded, local, strict=True) if not stays]
        cost = transport_bytes(sent, *formats, share, uploaded=uploaded, secure=secure)
        rows.append((words, cost, formats, subset))
    described = []
    for method, cost, used_formats, used in rows:
        memory = None
        if loss is not None:
            memory = fedsgd_memory(
                loss,
                params,
                batch,
                *(used_formats or (None, None)),
                share=share,
                subset=used,
                grad_clip=grad_clip,
            )
        described.append(
            {
                "method": method,
                "down_bytes": cost.down,
                "up_bytes": cost.up,
                "parameter_bytes": memory and memory.parameters,
                "peak_bytes": memory and memory.peak,
            }
        )
    return described


def _in_words(
    formats: tuple[FloatFormat | None, FloatFormat | None],
    subset: Subset | None,
    secure: SecureAggregation | None,
) -> str:
    """What makes a client's round unlike one of float32 and all variables; "" for nothing."""
    ways = zip(formats, ("download", "upload"), strict=True)
    words = [f"{fmt} {way}" for fmt, way in ways if fmt is not None]
    if subset is not None:
        words.append(f"trains by {subset.mode}")
    if secure is not None:
        words.append(f"{secure.bits} bits a coordinate under secure aggregation")
    return ", ".join(words)


def sent_size(
    params: Any, trained: Sequence[bool] | None = None, local: Sequence[bool] | None = None
) -> int:
    """Number of parameters that a client sends updates of.

    Args:
      params: the model's, or their shapes.
      trained, local: for each variable in order, whether clients train it, and whether it stays
        with the client; None for all and none.
    """
    leaves = jax.tree.leaves(params)
    trained = [True] * len(leaves) if trained is None else trained
    local = [False] * len(leaves) if local is None else local
    return sum(
        math.prod(leaf.shape)
        for leaf, known, stays in zip(leaves, trained, local, strict=True)
        if known and not stays
    )


def fedsgd_memory(
    loss: Loss,
    params: Any,
    batch: Any,
    download: FloatFormat | None = None,
    upload: FloatFormat | None = None,
    *,
    share: float = 0.9,
    subset: Subset | None = None,
    grad_clip: float | None = None,
    seed: int = 0,
) -> device.Memory:
    """Memory of one client's round of FedSGD, compiled for the first local device.

    Args:
      loss: see `fedasr.federated.client.Loss`.
      params, batch: arrays or shapes.
      download, upload, share: see `online.as_client_update`.
      subset: which variables are trained. Where clients or rounds differ, one is drawn by `seed`.
      grad_clip: see `device.fedsgd_program`.
    """
    shapes = jax.eval_shape(lambda x: x, params)
    matrices = sum(online.flags(shapes, online.weight_matrices))
    stored = shapes
    if download is not None:
        chosen = [bool(x) for x in online.choose(jax.random.key(seed), matrices, share)]
        stored = jax.eval_shape(lambda p: device.pack_params(p, download, chosen), shapes)
    trained = None if subset is None else subset.draw(shapes, jax.random.key(seed))
    program = device.fedsgd_program(loss, trained, upload, grad_clip=grad_clip)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return device.measure(program, stored, jax.eval_shape(lambda x: x, batch), key)
