"""Central training: of the seed, and of the baseline that forgets the users."""

import math
from collections.abc import Sequence

import jax

from fedasr.data.corpus import Corpus
from fedasr.errors import UserError
from fedasr.federated.client import Loss
from fedasr.models.recogniser import INPUTS
from fedasr.streams import Stream
from fedasr.training.builders import batches, corpora, models, optimizers
from fedasr.training.central import CentralTraining
from fedasr.training.central_local import LocalCentralTraining
from fedasr.training.config import Config
from fedasr.training.evaluation import MULTIPLES


def central_training(
    config: Config,
    section: str,
    corpus: Corpus,
    loss: Loss,
    devices: Sequence[jax.Device],
) -> CentralTraining:
    """Training on pooled data, as a section of the configuration says.

    Args:
      config: of the run.
      section: "seed_training" or "central".
      corpus, loss, devices: of the run.

    Raises:
      UserError: see `CentralTraining`.
    """
    settings = getattr(config, section)
    batch = batches.batch_size(settings)
    evaluated = config.evaluation.every_steps if section == "central" else 0
    return CentralTraining(
        corpus,
        loss,
        optimizers.central_optimizer(settings),
        batch["batch_size"],
        frames=batch["frames"],
        seed=config.seed,
        stream=Stream.SEED_TRAINING if section == "seed_training" else Stream.CENTRAL,
        # Those of its own corpus: others' lengths would say how the seed is rounded.
        multiples=MULTIPLES,
        # Saved and evaluated when reported.
        steps_per_report=math.gcd(10, config.checkpoint.seed_every, evaluated),
        devices=devices,
        select=INPUTS,
        model_devices=config.model_devices,
        trained=_trained(config) if section == "central" else None,
    )


def _trained(config: Config) -> list[bool] | None:
    """For each variable, whether the baseline trains it; `partial` is about clients alone."""
    return None if config.peft.kind == "full" else models.trained_variables(config)


def local_central_training(
    config: Config, corpus: Corpus, loss: Loss, devices: Sequence[jax.Device]
) -> LocalCentralTraining:
    """The baseline in which users keep local parameters, as the configuration says.

    Args:
      config, corpus, loss, devices: of the run.

    Raises:
      UserError: for batches and devices that it does not know.
    """
    layout, settings = models.local_layout(config), config.central
    assert layout is not None  # where there are local patterns
    if config.peft.kind != "full":
        raise UserError(
            "central training with local parameters trains all: unset peft.kind or local.patterns"
        )
    if settings.batch_seconds or config.model_devices > 1:
        raise UserError(
            "central training with local parameters takes batches of one user, counted in "
            "examples, on devices that hold the model each: unset central.batch_seconds and "
            "model_devices, or local.patterns"
        )
    return LocalCentralTraining(
        corpus,
        loss,
        optimizers.central_optimizer(settings),
        layout,
        settings.batch_size,
        seed=config.seed,
        multiples=MULTIPLES,
        steps_per_report=math.gcd(10, config.checkpoint.seed_every, config.evaluation.every_steps),
        devices=devices,
        select=INPUTS,
    )


def check_central(config: Config, data: corpora.Data, devices: Sequence[jax.Device]) -> None:
    """Raises UserError for central training that could not begin, before something else does."""
    stages = {"seed_training": (data.seed, models.build_base(config).loss)}
    loss = models.build_recogniser(config).loss
    if not config.has_rounds and config.local.patterns:
        local_central_training(config, data.train, loss, devices)
    elif not config.has_rounds:
        stages["central"] = data.train, loss
    for section, (corpus, loss) in stages.items():
        if corpus is not None:
            central_training(config, section, corpus, loss, devices)
