"""Speech recognisers by name, as the pure functions that the rest of the framework needs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig
from fedasr.errors import UserError
from fedasr.kernels.ctc import ctc_loss
from fedasr.kernels.rnnt import greedy_decode as rnnt_greedy_decode
from fedasr.kernels.rnnt import rnnt_loss
from fedasr.models import best_rq, pretrained, recurrent
from fedasr.models.conformer import Conformer, ConformerConfig
from fedasr.models.encoder_blocks import variables
from fedasr.models.objectives import ARRAYS as ARRAYS
from fedasr.models.objectives import INPUTS as INPUTS
from fedasr.models.objectives import Recogniser as Recogniser
from fedasr.models.objectives import from_forward, from_frames, streamed
from fedasr.models.transducer import Transducer
from fedasr.models.transformer import Transformer, TransformerConfig

_TRANSDUCER = "transducer"  # its parameters, beside an encoder's


def ctc_recogniser(
    module: Any, features: int, augment: SpecAugmentConfig | None = None
) -> Recogniser:
    """Wraps a linen encoder `module(features, lengths, keys) -> (logits, lengths)`.

    Args:
      module: such as `Transformer`.
      features: log-mel channels.
      augment: SpecAugment for training; None for none.
    """

    init = _encoder_init(module, features)

    def forward(params, batch, features, keys):
        logits, lengths = module.apply(
            variables(params), features, batch["features_length"], keys, **_shared(batch)
        )
        labels = batch["labels"], batch["labels_length"]
        values, feasible = ctc_loss(logits, lengths, *labels, streamed(logits, labels[0], keys))
        return values, values, feasible, (logits, lengths)

    return from_frames(init, forward, augment, getattr(module, "config", None))


def rnnt_recogniser(
    module: Any, transducer: Transducer, augment: SpecAugmentConfig | None = None
) -> Recogniser:
    """Wraps a linen encoder and what makes a transducer of it.

    The parameters are the encoder's, by their names, and the transducer's under "transducer". The
    loss of `evaluate` is the RNN-T loss alone, whatever the share of CTC in training.

    Args:
      module: an encoder, `module(features, lengths, keys) -> ([b, t, joint_dim], lengths)`.
      transducer: with the encoder's configuration.
      augment: see `ctc_recogniser`.
    """
    config = transducer.config
    encoder_init = _encoder_init(module, config.features)

    def init(key):
        example = jnp.zeros((1, 1, config.joint_dim)), jnp.zeros((1, 1), jnp.int32)
        own = transducer.init(jax.random.fold_in(key, 1), *example)["params"]
        return {**encoder_init(key), _TRANSDUCER: own}

    def apply(params, *args, method="__call__"):
        return transducer.apply({"params": params[_TRANSDUCER]}, *args, method=method)

    def forward(params, batch, features, keys):
        encoder = {name: value for name, value in params.items() if name != _TRANSDUCER}
        encoded, lengths = module.apply(
            variables(encoder), features, batch["features_length"], keys, **_shared(batch)
        )
        labels = batch["labels"], batch["labels_length"]
        scores = apply(params, encoded, batch["labels"])
        values, feasible = rnnt_loss(scores, lengths, *labels)
        training = values
        if share := config.ctc_weight:
            scores = apply(params, encoded, method="ctc_scores")
            training = (1 - share) * values + share * ctc_loss(scores, lengths, *labels)[0]
        return training, values, feasible, (encoded, lengths)

    def decode(params, outputs):
        def score(*args):
            return apply(params, *args, method="score")

        return rnnt_greedy_decode(score, *outputs, config.context, config.max_symbols)

    return from_forward(init, forward, decode, augment, config)


def recurrent_recogniser(config: recurrent.RecurrentConfig) -> Recogniser:
    """A decoder of neural recordings for one client, a recording day (see `recurrent`).

    Its own noise takes the place of SpecAugment. The loss that is trained includes the penalty on
    the parameters, that of `evaluate` does not.
    """

    def forward(params, batch, features, keys):
        outputs = recurrent.forward(params, features, batch["features_length"], keys, config)
        labels = batch["labels"], batch["labels_length"]
        values, feasible = ctc_loss(*outputs, *labels, streamed(outputs[0], labels[0], keys))
        return values + recurrent.penalty(params, config), values, feasible, outputs

    return from_frames(lambda key: recurrent.init(key, config), forward, None, config)


def _shared(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What a module takes of a whole batch, where it is so."""
    return {"batch_key": batch["batch_key"]} if "batch_key" in batch else {}


def _encoder_init(module: Any, features: int) -> Callable[[jax.Array], Any]:
    def init(key):
        example = jnp.zeros((1, 16, features)), jnp.full((1,), 16, jnp.int32)
        return module.init(key, *example)["params"]

    return init


def model_configs() -> dict[str, type]:
    """The class of a model's options, by the model's name."""
    others = {name: family.config for name, family in pretrained.FAMILIES.items()}
    return {name: pair[0] for name, pair in MODELS.items()} | _RECURRENT | others


def takes_audio(name: str) -> bool:
    """Whether a model hears audio, with a front end of its own, and not log-mel features."""
    return name in pretrained.FAMILIES


def recogniser(
    name: str, *, augment: SpecAugmentConfig | None = None, **options: Any
) -> Recogniser:
    """A recogniser by name, such as `recogniser("transformer", dim=128, blocks=4)`.

    Args:
      name, options, augment: see `make_recogniser`.

    Raises:
      UserError: see `make_recogniser`.
    """
    return make_recogniser(name, options, augment)


def make_recogniser(
    name: str, options: Mapping[str, Any], augment: SpecAugmentConfig | None = None
) -> Recogniser:
    """Builds a recogniser by name.

    Args:
      name: "transformer", "conformer", "recurrent" or one of `pretrained.FAMILIES`.
      options: fields of the model's configuration (`TransformerConfig`, `ConformerConfig`,
        `RecurrentConfig`, and those of the families); the rest keep defaults.
      augment: see `ctc_recogniser`.

    Raises:
      UserError: for an unknown name or option, or SpecAugment for a model that cannot have it.
    """
    configs = model_configs()
    if name not in configs:
        raise UserError(f"unknown model {name!r}: choose one of {sorted(configs)}")
    config_type = configs[name]
    known = {field.name for field in dataclasses.fields(config_type)}
    if unknown := sorted(set(options) - known):
        raise UserError(f"model {name!r} has no option {unknown}: it has {sorted(known)}")
    config = config_type(**options)
    if name in _RECURRENT:
        if augment is not None:
            raise UserError("the recurrent model has noise of its own: set augment.enabled=False")
        return recurrent_recogniser(config)
    if name in pretrained.FAMILIES:
        return pretrained.FAMILIES[name].recogniser(config, augment)
    return OBJECTIVES[config.objective](MODELS[name][1](config), config, augment)


# How an encoder is trained, from the module, its configuration and SpecAugment; the names are those
# of `fedasr.models.transducer.OBJECTIVES`.
OBJECTIVES: dict[str, Callable[[Any, Any, SpecAugmentConfig | None], Recogniser]] = {
    "best_rq": lambda m, c, a: best_rq.recogniser(m, c, a, _encoder_init(m, c.features)),
    "ctc": lambda m, c, a: ctc_recogniser(m, c.features, a),
    "rnnt": lambda m, c, a: rnnt_recogniser(m, Transducer(c), a),
}
MODELS: dict[str, tuple[type, Callable[[Any], Any]]] = {  # encoders of speech
    "conformer": (ConformerConfig, Conformer),
    "transformer": (TransformerConfig, Transformer),
}
_RECURRENT: dict[str, type] = {"recurrent": recurrent.RecurrentConfig}
