"""A whole configuration, checked: each field by itself, then what has to fit together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fedasr.errors import UserError
from fedasr.training.builders import (
    algorithms,
    batches,
    clients,
    corpora,
    decoders,
    devices,
    models,
    optimizers,
    participations,
    pretrained,
)
from fedasr.training.config import Config, check_fields
from fedasr.training.logging import to_json


def checked(given: Mapping[str, Any] | Config, workdir: str | Path | None = None) -> Config:
    """The configuration that a run is given, as a tree or typed.

    Args:
      given: a tree, or typed.
      workdir: of the run, if it is known: see `pretrained.resolved`.

    Raises:
      UserError: for mistakes that would otherwise show late, or not at all. What has to fit the
        data is for `corpora` to say.
    """
    tree = given.tree() if isinstance(given, Config) else given
    check_fields(tree)
    config = Config.of(to_json(tree))  # JSON has no NaN and no infinity: checked before
    config = pretrained.resolved(config, workdir)
    clients.check(config)
    models.check_local(config)
    optimizers.check(config)
    algorithms.check(config)
    participations.check(config)
    batches.check(config)
    corpora.check(config)
    models.check(config)
    devices.check(config)
    decoders.check(config)
    return config


def check_remote(config: Config, only_seed: bool = False) -> None:
    """Raises UserError for what a run in cloud storage cannot do."""
    if only_seed or config.seed_training.reuse:
        raise UserError(
            "a seed that other runs find (--action=seed_only, seed_training.reuse) lies beside its "
            "work directory, which must then be a local folder"
        )
    rows = models.keeps_rows(config)
    if rows and config.checkpoint.keep < 2:
        raise UserError(
            f"checkpoint.keep={config.checkpoint.keep}: users' rows in cloud storage need 2, those "
            "of the last checkpoint there must stay until the next one is whole"
        )
    if jax.process_count() > 1 and (config.selection.split or rows):
        raise UserError(
            "several processes with selection.split, local.patterns or an algorithm that remembers "
            "users need a work directory that all can read: mount the bucket"
        )


def check_seed(config: Config) -> None:
    """Raises UserError for a configuration that trains no seed, where that alone is wanted."""
    if config.init_from or not config.seed_training.steps:
        raise UserError(
            "--action=seed_only: this configuration trains no seed: set seed_training.steps, and "
            "no init_from"
        )
