"""What a family of pretrained models is: its options, its tensors and its recogniser."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig, spec_augment
from fedasr.errors import UserError
from fedasr.kernels.ctc import ctc_loss
from fedasr.models.layers import split_keys
from fedasr.models.objectives import Recogniser, from_frames, streamed
from fedasr.models.pretrained.audio import BLOCK_SAMPLES
from fedasr.models.pretrained.mapping import Entry

Array = jax.Array
# From a batch of audio to a model's inputs, and how long these are, int32 [b].
Front = Callable[[Mapping[str, Array]], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of models. To add one, write a module with such, and a line in `FAMILIES`.

    Attributes:
      config: class of its options, a frozen dataclass whose fields are numbers, names and flags.
      types: what config.json may call it ("model_type").
      prefix: from options to what the names of tensors begin with; some folders leave it out.
      head: regular expression of the names of the tensors that a new output layer replaces.
      options: from config.json, and what is said beside it (of preprocessing and generation), to
        options by name; raises UserError for a variant that is not known, and KeyError for what is
        missing.
      encoder: options of a model with a new output layer that are others.
      describe: from options to files of a folder that transformers loads, by name, config.json
        among them: the inverse of `options`; UserError where it has no such class.
      table: from options, and whether the output layer is among them, to the tensors.
      recogniser: from options and SpecAugment (None for none) to the recogniser.
      unused: regular expressions, searched for in names, of tensors that nothing here needs.
    """

    config: type
    types: Sequence[str]
    prefix: Callable[[Any], str]
    head: str
    options: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    describe: Callable[[Any], dict[str, dict[str, Any]]]
    table: Callable[[Any, bool], list[Entry]]
    recogniser: Callable[[Any, SpecAugmentConfig | None], Recogniser]
    unused: Sequence[str] = ()
    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def ctc(module: Any, config: Any, front: Front, augment: SpecAugmentConfig | None) -> Recogniser:
    """A recogniser of a linen encoder `module(inputs, lengths, keys) -> (logits, lengths)`.

    Args:
      module: see above.
      config: the model's, whose `generator` counts.
      front: what it hears of a batch of audio.
      augment: SpecAugment of inputs that are features; None for none.
    """

    def forward(params: Any, batch: Mapping[str, Array], features: Array, keys: Array | None):
        inputs, lengths = front({**batch, "features": features})
        inputs, keys = augmented(inputs, lengths, keys, augment)
        logits, lengths = module.apply({"params": params}, inputs, lengths, keys)
        labels = batch["labels"], batch["labels_length"]
        values, feasible = ctc_loss(logits, lengths, *labels, streamed(logits, labels[0], keys))
        return values, values, feasible, (logits, lengths)

    def init(key: Array) -> Any:
        return module.init(key, *front(example()))["params"]

    return from_frames(init, forward, None, config)


def augmented(
    inputs: Array, lengths: Array, keys: Array | None, augment: SpecAugmentConfig | None
) -> tuple[Array, Array | None]:
    """Inputs after SpecAugment, where there is any, and the keys that are left."""
    if augment is None or keys is None:
        return inputs, keys
    keys, masks = split_keys(keys, 2)
    return jax.vmap(lambda x, n, k: spec_augment(x, n, k, augment))(inputs, lengths, masks), keys


def check_blank(config: Any) -> None:
    """Raises UserError for a blank that is none of the output layer's tokens."""
    if config.blank >= config.vocab:
        raise UserError(f"the model's blank={config.blank} must be below vocab={config.vocab}")


def example(blocks: int = 16) -> dict[str, Array]:
    """A batch of audio, for the shapes of parameters."""
    return {
        "features": jnp.zeros((1, blocks, BLOCK_SAMPLES)),
        "features_length": jnp.full((1,), blocks, jnp.int32),
    }


def choose(config: Any, **choices: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises UserError for a field of a configuration that is none of the choices."""
    for name, options in choices.items():
        if (found := getattr(config, name)) not in options:
            raise UserError(f"the model's {name} must be one of {sorted(options)}: {found!r}")


def known(config: Mapping[str, Any], **wanted: Any) -> None:
    """Raises UserError for a setting of config.json that is there and is not what is known here."""
    if not isinstance(config, Mapping):
        raise UserError(f"config.json has {config!r} where settings should be: fetch it again")
    for name, value in wanted.items():
        if (found := config.get(name, value)) != value:
            raise UserError(
                f"config.json has {name}={found!r}, of which only {value!r} is known here: choose "
                "another model"
            )
