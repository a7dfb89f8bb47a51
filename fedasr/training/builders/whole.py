"""A whole configuration, checked: each field by itself, then what has to fit together."""

from collections.abc import Mapping
from typing import Any

from fedasr.training.builders import batches, clients, devices, models, optimizers
from fedasr.training.config import check_fields
from fedasr.training.logging import to_json


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON holds it, which has no NaN and no infinity: checked before.

    Raises:
      UserError: for mistakes that would otherwise show late, or not at all. What has to fit the
        data is for `corpora` to say.
    """
    check_fields(config)
    config = to_json(config)
    clients.check(config)
    models.check_local(config)
    optimizers.check(config)
    batches.check(config)
    models.check(config)
    devices.check(config)
    return config
