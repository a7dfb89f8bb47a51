"""The recogniser, and which of its variables are trained, shared or local to the users."""

import dataclasses
import math
from typing import Any

import jax

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.audio.features import LogMelConfig
from fedasr.compression import costs
from fedasr.errors import UserError
from fedasr.federated.algorithms import memory_layout, part_of_module
from fedasr.federated.local import (
    Rows,
    check_prototype,
    make_layout,
)
from fedasr.models import peft
from fedasr.models.recogniser import Recogniser, make_recogniser
from fedasr.streams import Stream, seed_key
from fedasr.training.builders import clients
from fedasr.training.config import Config


def build_recogniser(config: Config, augmented: bool = True) -> Recogniser:
    """The recogniser of a configuration.

    Args:
      config: of the run.
      augmented: whether its loss augments, if the configuration says so at all.

    Raises:
      UserError: for an unknown model or option.
    """
    return peft.adapt(build_base(config, augmented), clients.peft_config(config))


def build_base(config: Config, augmented: bool = True) -> Recogniser:
    """The recogniser before it is adapted; see `build_recogniser`."""
    augment = _augment(config) if config.augment.enabled and augmented else None
    return make_recogniser(config.model.name, config.model.options, augment)


def base_params(config: Config) -> Any:
    """The untrained model before it is adapted, in float32: what a seed's training begins with."""
    return build_base(config).init(seed_key(config.seed, Stream.INIT))


def base_shapes(config: Config) -> Any:
    """Shapes of the parameters of the recogniser before it is adapted."""
    return jax.eval_shape(build_base(config).init, jax.random.key(0))


def completed(params: Any, config: Config) -> Any:
    """A base's parameters with what the configuration's adaptation adds, as a run keeps them."""
    key = seed_key(config.seed, Stream.INIT)
    return peft.completed(params, clients.peft_config(config), key)


def initial_params(recogniser: Recogniser, config: Config) -> Any:
    """The untrained model of a configuration: the same for all runs of one seed."""
    return recogniser.init(seed_key(config.seed, Stream.INIT))


def variable_shapes(config: Config) -> Any:
    """Shapes of a configuration's parameters, without allocating them."""
    return jax.eval_shape(build_recogniser(config).init, jax.random.key(0))


def parameter_count(recogniser: Recogniser) -> int:
    """Number of parameters, without allocating them."""
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def keeps_rows(config: Config) -> bool:
    """Whether a run keeps something of each user from round to round, in a store."""
    if config.local.patterns:
        return True
    return config.has_rounds and part_of_module(config.algorithm, "memory") is not None


def local_layout(config: Config) -> Rows | None:
    """How what stays with users lies in their rows; None if nothing does.

    Local variables, or what the algorithm remembers of each.

    Raises:
      UserError: see `fedasr.federated.local.make_layout`; or both would.
    """
    if not keeps_rows(config):
        return None
    shapes = variable_shapes(config)
    # Central training knows no partial model: it trains all.
    trained = trained_variables(config) if config.has_rounds else None
    layout = memory_layout(config.algorithm, shapes, trained) if config.has_rounds else None
    if layout is None:
        return make_layout(shapes, config.local.patterns, trained)
    if config.local.patterns:
        raise UserError(
            f"algorithm={config.algorithm!r} remembers its users, where local variables would lie: "
            "unset local.patterns, or choose an algorithm without a memory"
        )
    return layout


def shared_variables(config: Config) -> list[bool] | None:
    """For each of the model's variables, whether users send updates of it; None if of all."""
    layout = local_layout(config)
    return trained_variables(config) if layout is None else layout.shared


def sent_parameters(config: Config) -> int:
    """Number of parameters that users send updates of."""
    shapes = variable_shapes(config)
    layout = local_layout(config)
    local = None if layout is None else layout.local
    return costs.sent_size(shapes, trained_variables(config), local)


def trained_variables(config: Config) -> list[bool] | None:
    """For each of the model's variables, whether it is ever trained; None if all are.

    Raises:
      UserError: for a pattern of `partial` or `peft` that matches no variable.
    """
    subset = clients.make_subset(config)
    if subset is None:
        return None
    return subset.trained(variable_shapes(config))


def _augment(config: Config) -> SpecAugmentConfig:
    """Raises UserError for an option that there is not."""
    options = config.augment.options
    names = [field.name for field in dataclasses.fields(SpecAugmentConfig)]
    if unknown := sorted(options.keys() - set(names)):
        raise UserError(f"augment.options has no {unknown[0]}: it has {', '.join(names)}")
    return SpecAugmentConfig(**options)


def check_local(config: Config) -> None:
    """Raises UserError for local parameters that the model does not have."""
    check_prototype(config.local.prototype)
    local_layout(config)


def check(config: Config) -> None:
    """Raises UserError for a model that does not take the features, and for unknown options."""
    # The channels of neural recordings are known with the data (`corpora.Data`).
    mels = LogMelConfig().num_mels
    if config.model.name != "recurrent":
        if config.model.options.get("features", mels) != mels:
            raise UserError(f"the data needs model.options.features={mels}")
    _augment(config)
