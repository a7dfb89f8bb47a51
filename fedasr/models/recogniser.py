"""Speech recognisers by name, as the pure functions that the rest of the framework needs."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig, spec_augment
from fedasr.errors import UserError
from fedasr.kernels.ctc import ctc_loss, greedy_decode
from fedasr.kernels.rnnt import greedy_decode as rnnt_greedy_decode
from fedasr.kernels.rnnt import rnnt_loss
from fedasr.models import recurrent
from fedasr.models.conformer import Conformer, ConformerConfig
from fedasr.models.layers import split_keys
from fedasr.models.transducer import Transducer
from fedasr.models.transformer import Transformer, TransformerConfig
from fedasr.streams import Stream, fold

ARRAYS = ("features", "labels")  # what a speech example must hold
_TRANSDUCER = "transducer"  # its parameters, beside an encoder's


class Recogniser(NamedTuple):
    """A recogniser as pure functions over a plain pytree of parameters.

    init(key) -> params. loss(params, batch, key) -> (loss, aux): training, with augmentation and
    dropout. evaluate(params, batch) -> (tokens int32 [b, t], token counts int32 [b], loss float32
    [b], valid bool [b]): greedy decoding without randomness; `valid` is False for padding and for
    utterances whose transcript cannot be aligned with their frames. scores(params, batch) -> (log
    probabilities of the tokens in each frame, float32 [b, t, vocab], frame counts int32 [b], loss,
    valid): what the decoders of `fedasr.decoding` search; None where there are none (RNN-T).

    A batch holds "features" [b, t, f], "features_length" [b], "labels" [b, u], "labels_length" [b]
    and "mask" [b].
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict]]
    evaluate: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]]
    scores: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]] | None = None


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
            {"params": params}, features, batch["features_length"], keys, **_shared(batch)
        )
        labels = batch["labels"], batch["labels_length"]
        values, feasible = ctc_loss(logits, lengths, *labels, _streamed(logits, labels[0], keys))
        return values, values, feasible, (logits, lengths)

    return _ctc(init, forward, augment, _draws_alike(module))


def _ctc(
    init: Callable, forward: Callable, augment: SpecAugmentConfig | None, alike: bool = False
) -> Recogniser:
    """What models with scores in each frame share; see `_recogniser`."""

    def decode(params, outputs):
        return greedy_decode(*outputs)

    def scores(params, batch):
        features = batch["features"].astype(jnp.float32)
        _, values, feasible, (logits, lengths) = forward(params, batch, features, None)
        valid = batch["mask"] & feasible
        return jax.nn.log_softmax(logits), lengths, jnp.where(valid, values, 0.0), valid

    return _recogniser(init, forward, decode, augment, alike)._replace(scores=scores)


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
            {"params": encoder}, features, batch["features_length"], keys, **_shared(batch)
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

    return _recogniser(init, forward, decode, augment, _draws_alike(module))


def recurrent_recogniser(config: recurrent.RecurrentConfig) -> Recogniser:
    """A decoder of neural recordings for one client, a recording day (see `recurrent`).

    Its own noise takes the place of SpecAugment. The loss that is trained includes the penalty on
    the parameters, that of `evaluate` does not.
    """

    def forward(params, batch, features, keys):
        outputs = recurrent.forward(params, features, batch["features_length"], keys, config)
        labels = batch["labels"], batch["labels_length"]
        values, feasible = ctc_loss(*outputs, *labels, _streamed(outputs[0], labels[0], keys))
        return values + recurrent.penalty(params, config), values, feasible, outputs

    return _ctc(lambda key: recurrent.init(key, config), forward, None)


_STREAMED = 1 << 24  # scores of all states in all frames, beyond which they are not kept


def _streamed(logits: jax.Array, labels: jax.Array, keys: jax.Array | None) -> bool:
    """Whether a loss should be computed without them: of long recordings, without a gradient."""
    return keys is None and 2 * math.prod(logits.shape[:2]) * labels.shape[1] > _STREAMED


def _draws_alike(module: Any) -> bool:
    """Whether all parts of a batch drop the same blocks."""
    return getattr(getattr(module, "config", None), "layer_drop_per", "part") == "batch"


def _shared(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What a module takes of a whole batch, where it is so."""
    return {"batch_key": batch["batch_key"]} if "batch_key" in batch else {}


def _encoder_init(module: Any, features: int) -> Callable[[jax.Array], Any]:
    def init(key):
        example = jnp.zeros((1, 16, features)), jnp.full((1,), 16, jnp.int32)
        return module.init(key, *example)["params"]

    return init


def _recogniser(
    init: Callable,
    forward: Callable,
    decode: Callable,
    augment: SpecAugmentConfig | None,
    alike: bool = False,
) -> Recogniser:
    """What all objectives share.

    forward(params, batch, features, keys or None) -> (losses to train with [b], losses to report
    [b], feasible [b], outputs). decode(params, outputs) -> (tokens, counts). alike: whether
    `forward` finds a "batch_key" in training batches, the same for all parts of one.
    """

    def loss(params, batch, key):
        slots = jnp.arange(batch["mask"].shape[0])
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(slots)
        keys, masks = split_keys(keys, 2)
        if alike:
            shared = fold(batch.get("batch_key", key), Stream.BATCH)
            batch = {**batch, "batch_key": shared}
        features = batch["features"].astype(jnp.float32)
        if augment is not None:
            features = jax.vmap(lambda x, n, k: spec_augment(x, n, k, augment))(
                features, batch["features_length"], masks
            )
        values, _, feasible, _ = forward(params, batch, features, keys)
        valid = batch["mask"] & feasible
        mean = jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        aux = {
            "utterances": jnp.sum(valid, dtype=jnp.int32),
            "infeasible": jnp.sum(batch["mask"] & ~valid, dtype=jnp.int32),
        }
        return mean, aux

    def evaluate(params, batch):
        features = batch["features"].astype(jnp.float32)
        _, values, feasible, outputs = forward(params, batch, features, None)
        valid = batch["mask"] & feasible
        tokens, counts = decode(params, outputs)
        return tokens, counts, jnp.where(valid, values, 0.0), valid

    # Op by op, the initialisation of a small model would take seconds.
    return Recogniser(jax.jit(init), loss, evaluate)


def model_configs() -> dict[str, type]:
    """The class of a model's options, by the model's name."""
    return {name: pair[0] for name, pair in MODELS.items()} | _RECURRENT


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
      name: "transformer", "conformer" or "recurrent".
      options: fields of the model's configuration (`TransformerConfig`, `ConformerConfig`,
        `RecurrentConfig`); the rest keep defaults.
      augment: see `ctc_recogniser`.

    Raises:
      UserError: for an unknown name or option, or SpecAugment for a recurrent model.
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
    module = MODELS[name][1]
    if config.objective == "rnnt":
        return rnnt_recogniser(module(config), Transducer(config), augment)
    return ctc_recogniser(module(config), config.features, augment)


MODELS: dict[str, tuple[type, Callable[[Any], Any]]] = {  # encoders of speech
    "conformer": (ConformerConfig, Conformer),
    "transformer": (TransformerConfig, Transformer),
}
_RECURRENT: dict[str, type] = {"recurrent": recurrent.RecurrentConfig}
