"""The parameters that a run starts from: those of another run, by `init_from`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.training.builders import models, pretrained
from fedasr.training.checkpoint import (
    has_checkpoint,
    restore_params,
)
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.config import Config
from fedasr.training.stored import find_step


def check_there(config: Config, workdir: Path) -> None:
    """Raises UserError if a run would have nothing to start from; before data is made for it."""
    if config.init_from and not has_checkpoint(workdir) and not pretrained.is_pretrained(config):
        find_step(config.init_from)  # of others `pretrained.resolved` has looked


def read_start(
    config: Config, existing: Mapping[str, Any] | None, workdir: Path
) -> dict[str, Any] | None:
    """The parameters that a run starts from; None without init_from, or if it has started.

    What a run has started from may be gone once there is a checkpoint, or have been trained on.
    """
    if not config.init_from:
        return None
    same = existing is not None and existing.get("init_from") == config.init_from
    if same and has_checkpoint(workdir):
        return None
    return _read_start(config)


def _read_start(config: Config) -> dict[str, Any]:
    """Raises UserError if there is none, or it is of another model or alphabet."""
    path = config.init_from
    shapes = models.variable_shapes(config)
    if pretrained.is_pretrained(config):
        pretrained.check_tokenizer(config, config.data.characters)
        return models.as_kept(pretrained.read_params(config, shapes), config)
    start = _loaded(path, shapes)
    theirs = checkpoint_metadata(path).get("config", {}).get("data", {}).get("characters")
    ours = theirs if config.data.characters is None else config.data.characters
    if theirs not in (None, ours):
        raise UserError(f"init_from={path} writes the characters {theirs!r}, the data {ours!r}")
    return start


def _loaded(path: str, like: Any) -> Any:
    """Parameters of a checkpoint, checked against the model's shapes."""
    params = restore_params(path)
    theirs = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}
    ours = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(like)}
    if theirs != ours:
        name = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))[0]
        raise UserError(
            f"init_from={path} holds another model: {name} is {theirs.get(name)} there, "
            f"{ours.get(name)} here"
        )
    return jax.tree.map(lambda x, own: jnp.asarray(x, own.dtype), params, like)
