"""From a configuration's `compression` and `partial` to a client update and its costs."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fedasr.compression import device, online
from fedasr.compression.formats import FloatFormat
from fedasr.compression.partial import Subset, partial_training
from fedasr.compression.transport import transport_bytes
from fedasr.errors import UserError
from fedasr.federated.client import ClientUpdate, Loss
from fedasr.federated.subset import keep
from fedasr.privacy.settings import make_secure


def make_formats(config: Mapping[str, Any]) -> tuple[FloatFormat | None, FloatFormat | None]:
    """Formats of the download and of the upload; None for float32.

    Raises:
      UserError: for an unknown format, or a share out of range.
    """
    settings = config["compression"]
    online.check_share(settings["share"])
    down, up = (
        FloatFormat.parse(name) if name else None
        for name in (settings["download"], settings["upload"])
    )
    return down, up


def make_subset(config: Mapping[str, Any]) -> Subset | None:
    """Which variables clients train; None for all.

    Raises:
      UserError: see `Subset`.
    """
    settings = config["partial"]
    everything = settings["mode"] == "all"
    subset = Subset(
        "user" if everything else settings["mode"],
        tuple(settings["patterns"]),
        settings["groups"],
        settings["share"],
        config["seed"],
    )
    return None if everything else subset


def make_client_update(
    config: Mapping[str, Any], make_update: Callable[[Loss], ClientUpdate], loss: Loss
) -> ClientUpdate:
    """Local training as the configuration wants it: of a subset, from and to compressed variables.

    Args:
      config: of the run.
      make_update: from a loss to local training.
      loss: see `fedasr.federated.client.Loss`.
    """
    subset, settings = make_subset(config), config["compression"]
    update = partial_training(make_update, loss, subset) if subset else make_update(loss)
    down, up = make_formats(config)
    if down is None and up is None:
        return update
    return online.as_client_update(
        update, down, settings["share"], _sent_matrices(config), align=settings["align"], upload=up
    )


def _sent_matrices(config: Mapping[str, Any]) -> online.Select:
    """The weight matrices that are not local: what stays with a client is never rounded."""

    def select(path, leaf):
        local = any(re.search(pattern, path) for pattern in config["local"]["patterns"])
        return online.weight_matrices(path, leaf) and not local

    return select


def describe_client(
    config: Mapping[str, Any],
    params: Any,
    loss: Loss | None = None,
    batch: Any = None,
    local: Sequence[bool] | None = None,
) -> list[dict[str, Any]]:
    """What a client of the run receives, sends and holds, beside one without any of it.

    Args:
      config: of the run.
      params: the model's parameters, or their shapes.
      loss, batch: to measure memory as well, which compiles two programs (FedSGD only): the loss
        and arrays, or shapes, of a client's batch.
      local: for each variable in order, whether it stays with the client; None for none.

    Returns:
      Rows with `method`, `down_bytes` and `up_bytes` per client and round, `parameter_bytes` (as
      they lie on the device) and `peak_bytes`, the last two None where not measured.
    """
    sent = params if local is None else keep(params, [not own for own in local])
    plain = transport_bytes(sent)
    rows = [("float32, all variables", plain, None, None)]
    subset, (down, up) = make_subset(config), make_formats(config)
    words = [f"{fmt} {way}" for fmt, way in ((down, "download"), (up, "upload")) if fmt is not None]
    if subset is not None:
        words.append(f"trains by {subset.mode}")
    trained = None if subset is None else subset.trained(params)
    secure = make_secure(config, sent_size(params, trained, local))
    if secure is not None:
        words.append(f"{secure.bits} bits a coordinate under secure aggregation")
    if words:
        share = config["compression"]["share"]
        uploaded = None if subset is None else subset.uploaded(params)
        if uploaded is not None and local is not None:
            uploaded = [p for p, own in zip(uploaded, local, strict=True) if not own]
        cost = transport_bytes(sent, down, up, share, uploaded=uploaded, secure=secure)
        rows.append((", ".join(words), cost, (down, up), subset))
    described = []
    for method, cost, formats, used in rows:
        memory = None
        if loss is not None:
            memory = fedsgd_memory(
                loss,
                params,
                batch,
                *(formats or (None, None)),
                share=config["compression"]["share"],
                subset=used,
                grad_clip=config["client"]["grad_clip"],
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
        for leaf, known, own in zip(leaves, trained, local, strict=True)
        if known and not own
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


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError for settings that make no sense."""
    make_formats(config)
    make_subset(config)
    client = config["client"]
    fedsgd = client["steps"] == 1 and client["optimizer"] == "sgd"
    if config["compression"]["measure"] and config["local"]["patterns"]:
        raise UserError("compression.measure does not know local parameters: unset one of them")
    if config["compression"]["measure"] and not fedsgd:
        raise UserError(
            "compression.measure measures FedSGD: it needs client.steps=1, client.optimizer=sgd"
        )
