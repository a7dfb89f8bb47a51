"""A whole configuration, checked: each field by itself, then what has to fit together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedasr.training.builders import (
    batches,
    clients,
    decoders,
    devices,
    models,
    optimizers,
    pretrained,
)
from fedasr.training.config import Config, check_fields
from fedasr.training.logging import to_json


def checked(given: Mapping[str, Any] | Config, workdir: Path | None = None) -> Config:
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
    batches.check(config)
    models.check(config)
    devices.check(config)
    decoders.check(config)
    return config
