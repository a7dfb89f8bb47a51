"""Speech recognisers by name, as the pure functions that the rest of the framework needs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig, spec_augment
from fedasr.ctc import ctc_loss, greedy_decode
from fedasr.errors import UserError
from fedasr.models.conformer import ConformerConfig, CTCConformer
from fedasr.models.layers import split_keys
from fedasr.models.transformer import CTCTransformer, TransformerConfig

ARRAYS = ("features", "labels")  # what a speech example must hold


class Recogniser(NamedTuple):
    """A recogniser as pure functions over a plain pytree of parameters.

    init(key) -> params. loss(params, batch, key) -> (loss, aux): training, with augmentation and
    dropout. evaluate(params, batch) -> (tokens int32 [b, t], token counts int32 [b], loss float32
    [b], valid bool [b]): greedy decoding without randomness; `valid` is False for padding and for
    utterances whose transcript cannot be aligned with their frames.

    A batch holds "features" [b, t, f], "features_length" [b], "labels" [b, u], "labels_length" [b]
    and "mask" [b].
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict]]
    evaluate: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]]


def ctc_recogniser(
    module: Any, features: int, augment: SpecAugmentConfig | None = None
) -> Recogniser:
    """Wraps a linen encoder `module(features, lengths, keys) -> (logits, lengths)`.

    Args:
      module: such as `CTCTransformer`.
      features: log-mel channels.
      augment: SpecAugment for training; None for none.
    """

    def init(key):
        example = jnp.zeros((1, 16, features)), jnp.full((1,), 16, jnp.int32)
        return module.init(key, *example)["params"]

    def losses(params, batch, features, keys):
        logits, lengths = module.apply({"params": params}, features, batch["features_length"], keys)
        values, feasible = ctc_loss(logits, lengths, batch["labels"], batch["labels_length"])
        return values, batch["mask"] & feasible, logits, lengths

    def loss(params, batch, key):
        slots = jnp.arange(batch["mask"].shape[0])
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(slots)
        keys, masks = split_keys(keys, 2)
        features = batch["features"].astype(jnp.float32)
        if augment is not None:
            features = jax.vmap(lambda x, n, k: spec_augment(x, n, k, augment))(
                features, batch["features_length"], masks
            )
        values, valid, _, _ = losses(params, batch, features, keys)
        mean = jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        aux = {
            "utterances": jnp.sum(valid, dtype=jnp.int32),
            "infeasible": jnp.sum(batch["mask"] & ~valid, dtype=jnp.int32),
        }
        return mean, aux

    def evaluate(params, batch):
        features = batch["features"].astype(jnp.float32)
        values, valid, logits, lengths = losses(params, batch, features, None)
        tokens, counts = greedy_decode(logits, lengths)
        return tokens, counts, jnp.where(valid, values, 0.0), valid

    # Op by op, the initialisation of a small model would take seconds.
    return Recogniser(jax.jit(init), loss, evaluate)


def make_recogniser(
    name: str, options: Mapping[str, Any], augment: SpecAugmentConfig | None = None
) -> Recogniser:
    """Builds a recogniser by name.

    Args:
      name: "transformer" or "conformer".
      options: fields of the model's configuration (`TransformerConfig`, `ConformerConfig`); the
        rest keep defaults.
      augment: see `ctc_recogniser`.

    Raises:
      UserError: for an unknown name or option.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {sorted(MODELS)}")
    config_type, module = MODELS[name]
    known = {field.name for field in dataclasses.fields(config_type)}
    if unknown := sorted(set(options) - known):
        raise UserError(f"model {name!r} has no option {unknown}: it has {sorted(known)}")
    config = config_type(**options)
    return ctc_recogniser(module(config), config.features, augment)


MODELS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "conformer": (ConformerConfig, CTCConformer),
    "transformer": (TransformerConfig, CTCTransformer),
}
