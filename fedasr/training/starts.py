"""The parameters that a run starts from: those of another run, by `init_from`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.models import best_rq, peft
from fedasr.training import exported
from fedasr.training.builders import clients, models, pretrained
from fedasr.training.checkpoint import (
    has_checkpoint,
    restore_params,
)
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.config import Config
from fedasr.training.stored import find_step
from fedasr.training.workdir import recorded_config


def check_there(config: Config, workdir: Path) -> None:
    """Raises UserError if a run would have nothing to start from; before data is made for it."""
    if not config.init_from or has_checkpoint(workdir) or pretrained.is_pretrained(config):
        return  # of pretrained ones `pretrained.resolved` has looked
    if not exported.is_exported(config.init_from):
        find_step(config.init_from)


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
        base = pretrained.read_params(config, models.base_shapes(config))
        return models.completed(base, config)
    start = _loaded(path, shapes, config)
    theirs = checkpoint_metadata(path).get("config", {}).get("data", {}).get("characters")
    ours = theirs if config.data.characters is None else config.data.characters
    if theirs not in (None, ours):
        raise UserError(f"init_from={path} writes the characters {theirs!r}, the data {ours!r}")
    return start


def _adapted(params: Any, path: str, config: Config) -> Any:
    """A start's parameters as the run has them: adapted alike, or its base adapted anew."""
    params = _with_new_output(params, path, config)
    theirs = clients.peft_config(recorded_config(checkpoint_metadata(path).get("config", {})))
    ours = clients.peft_config(config)
    if theirs.kind != "full" and dataclasses.replace(theirs, also=(), frozen_dtype="") != (
        dataclasses.replace(ours, also=(), frozen_dtype="")
    ):
        params = peft.merged(params, theirs)
    return models.completed(jax.tree.map(_in_float32, params), config)


def _with_new_output(params: Any, path: str, config: Config) -> Any:
    """Of an encoder that was trained without transcripts for a run with: its output layer anew."""
    theirs = recorded_config(checkpoint_metadata(path).get("config", {})).model.options
    if theirs.get("objective") != best_rq.OBJECTIVE:
        return params
    if config.model.options.get("objective") == best_rq.OBJECTIVE:
        return params
    fresh = models.base_params(config)
    encoder = {name: value for name, value in params.items() if name != best_rq.OUTPUT}
    return {**fresh, **encoder}


def _in_float32(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def _loaded(path: str, like: Any, config: Config) -> Any:
    """Parameters of a checkpoint, checked against the model's shapes."""
    params = _adapted(restore_params(path), path, config)
    theirs = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}
    ours = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(like)}
    if theirs != ours:
        name = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))[0]
        raise UserError(
            f"init_from={path} holds another model: {name} is {theirs.get(name)} there, "
            f"{ours.get(name)} here"
        )
    return jax.tree.map(lambda x, own: jnp.asarray(x, own.dtype), params, like)
