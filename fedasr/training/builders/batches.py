"""How many examples, or how much audio, is computed together."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.audio.features import LogMelConfig
from fedasr.data.batching import Batching, Bucket, Grid, Resident
from fedasr.errors import UserError
from fedasr.models.recogniser import INPUTS
from fedasr.training.config import Config
from fedasr.training.sections import Central, Client

_HOP_SECONDS = LogMelConfig().hop_ms / 1000


def check(config: Config) -> None:
    """Raises UserError for batches that cannot be made."""
    make_batching(config)
    if config.model.name == "recurrent":
        sections = ("seed_training", "central", "client")
        if timed := [name for name in sections if getattr(config, name).batch_seconds]:
            raise UserError(f"{timed[0]}.batch_seconds counts audio: a recurrent model has none")


def make_batching(
    config: Config,
    buckets: Sequence[Bucket] | Grid | None = None,
    resident: Resident | None = None,
) -> Batching:
    """A client's batches in a round.

    Args:
      config: of the run.
      buckets, resident: see `Batching`.

    Raises:
      UserError: see `Batching`.
    """
    client = config.client
    return Batching(
        **batch_size(client),
        steps=client.steps or None,
        epochs=client.epochs or None,
        max_steps=client.max_steps or None,
        buffer=client.batch_buffer or None,
        buckets=buckets,
        micro_batch=client.micro_batch,
        select=INPUTS,
        resident=resident,
    )


def batch_size(settings: Central | Client) -> dict[str, int | None]:
    """How large a batch is: examples, or frames where it is given in seconds of audio."""
    if not settings.batch_seconds:
        return {"batch_size": settings.batch_size, "frames": None}
    return {"batch_size": None, "frames": round(settings.batch_seconds / _HOP_SECONDS)}


def batch_shapes(config: Config, bucket: Mapping[str, int]) -> dict[str, Any]:
    """Shapes of a client's largest batch."""
    size = config.client.batch_size
    mels = config.model.options.get("features", LogMelConfig().num_mels)
    shapes = {
        "features": ((size, bucket["features"], mels), jnp.float32),
        "features_length": ((size,), jnp.int32),
        "labels": ((size, bucket["labels"]), jnp.int32),
        "labels_length": ((size,), jnp.int32),
        "mask": ((size,), jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
