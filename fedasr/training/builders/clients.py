"""What clients do in a round: local training of a subset, from and to compressed variables."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from fedasr.compression import costs, online
from fedasr.compression.formats import FloatFormat
from fedasr.compression.partial import Subset, partial_training
from fedasr.errors import UserError
from fedasr.federated.client import ClientUpdate, Loss
from fedasr.models import peft
from fedasr.training.builders import mechanisms
from fedasr.training.config import Config


def make_formats(config: Config) -> tuple[FloatFormat | None, FloatFormat | None]:
    """Formats of the download and of the upload; None for float32.

    Raises:
      UserError: for an unknown format, or a share out of range.
    """
    settings = config.compression
    online.check_share(settings.share)
    down, up = (
        FloatFormat.parse(name) if name else None for name in (settings.download, settings.upload)
    )
    return down, up


def make_subset(config: Config) -> Subset | None:
    """Which variables clients train; None for all.

    Raises:
      UserError: see `Subset`.
    """
    settings = config.partial
    everything = settings.mode == "all"
    adaptation = peft_config(config)
    if (patterns := peft.trained_patterns(adaptation)) is not None:
        if not everything:
            raise UserError(
                f"partial.mode={settings.mode!r} and peft.kind={adaptation.kind!r} both say what "
                "is trained: unset one of them"
            )
        return Subset("fixed", patterns, setting="peft")
    subset = Subset(
        "user" if everything else settings.mode,
        tuple(settings.patterns),
        settings.groups,
        settings.share,
        config.seed,
    )
    return None if everything else subset


def peft_config(config: Config) -> peft.PeftConfig:
    """How the recogniser is adapted."""
    return peft.PeftConfig(**dataclasses.asdict(config.peft))


def takes_stacks(config: Config) -> bool:
    """Whether local training takes stacked blocks (`fedasr.stacks`): of all that they hold."""
    scanned = bool(config.model.options.get("scan_blocks"))
    return scanned and make_subset(config) is None and make_formats(config) == (None, None)


def make_client_update(
    config: Config, make_update: Callable[[Loss], ClientUpdate], loss: Loss
) -> ClientUpdate:
    """Local training as the configuration wants it: of a subset, from and to compressed variables.

    Args:
      config: of the run.
      make_update: from a loss to local training.
      loss: see `fedasr.federated.client.Loss`.
    """
    subset, settings = make_subset(config), config.compression
    update = partial_training(make_update, loss, subset) if subset else make_update(loss)
    down, up = make_formats(config)
    if down is None and up is None:
        return update
    return online.as_client_update(
        update, down, settings.share, _sent_matrices(config), align=settings.align, upload=up
    )


def _sent_matrices(config: Config) -> online.Select:
    """The weight matrices that are not local: what stays with a client is never rounded."""

    def select(path, leaf):
        local = any(re.search(pattern, path) for pattern in config.local.patterns)
        return online.weight_matrices(path, leaf) and not local

    return select


def describe_client(
    config: Config,
    params: Any,
    loss: Loss | None = None,
    batch: Any = None,
    local: Sequence[bool] | None = None,
) -> list[dict[str, Any]]:
    """What a client of the run receives and sends; see `fedasr.compression.costs.describe_client`.

    Args:
      config: of the run.
      params: the model's parameters, or their shapes.
      loss, batch: to measure memory as well.
      local: for each variable in order, whether it stays with the client; None for none.
    """
    subset = make_subset(config)
    trained = None if subset is None else subset.trained(params)
    return costs.describe_client(
        params,
        make_formats(config),
        share=config.compression.share,
        subset=subset,
        secure=mechanisms.make_secure(config, costs.sent_size(params, trained, local)),
        local=local,
        loss=loss,
        batch=batch,
        grad_clip=config.client.grad_clip,
    )


def check(config: Config) -> None:
    """Raises UserError for settings that make no sense."""
    make_formats(config)
    make_subset(config)
    client = config.client
    fedsgd = client.steps == 1 and client.optimizer == "sgd"
    if config.compression.measure and config.local.patterns:
        raise UserError("compression.measure does not know local parameters: unset one of them")
    if config.compression.measure and not fedsgd:
        raise UserError(
            "compression.measure measures FedSGD: it needs client.steps=1, client.optimizer=sgd"
        )
