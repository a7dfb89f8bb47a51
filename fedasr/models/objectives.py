"""What recognisers of all kinds share: the pure functions, their losses and their decoding."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedasr.audio.augment import SpecAugmentConfig, spec_augment
from fedasr.generators import drawing
from fedasr.kernels.ctc import greedy_decode
from fedasr.models.layers import split_keys
from fedasr.streams import Stream, fold

ARRAYS = ("features", "labels")  # what a speech example must hold
INPUTS = (*ARRAYS, "samples")  # what a loss takes of it, the last of audio alone


class Recogniser(NamedTuple):
    """A recogniser as pure functions over a plain pytree of parameters.

    init(key) -> params. loss(params, batch, key) -> (loss, aux): training, with augmentation and
    dropout. evaluate(params, batch) -> (tokens int32 [b, t], token counts int32 [b], loss float32
    [b], valid bool [b]): greedy decoding without randomness; `valid` is False for padding and for
    utterances whose transcript cannot be aligned with their frames. scores(params, batch) -> (log
    probabilities of the tokens in each frame, float32 [b, t, vocab], frame counts int32 [b], loss,
    valid): what the decoders of `fedasr.decoding` search; None where there are none (RNN-T, and
    Whisper's decoder).

    A batch holds "features" [b, t, f], "features_length" [b], "labels" [b, u], "labels_length" [b]
    and "mask" [b]; for models that hear audio see `fedasr.models.pretrained.audio`.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict]]
    evaluate: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]]
    scores: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]] | None = None


def from_frames(
    init: Callable, forward: Callable, augment: SpecAugmentConfig | None, config: Any = None
) -> Recogniser:
    """What models with scores in each frame share; see `from_forward`."""

    def decode(params, outputs):
        return greedy_decode(*outputs)

    def scores(params, batch):
        features = batch["features"].astype(jnp.float32)
        _, values, feasible, (logits, lengths) = forward(params, batch, features, None)
        valid = batch["mask"] & feasible
        return jax.nn.log_softmax(logits), lengths, jnp.where(valid, values, 0.0), valid

    return from_forward(init, forward, decode, augment, config)._replace(scores=scores)


_STREAMED = 1 << 24  # scores of all states in all frames, beyond which they are not kept


def streamed(logits: jax.Array, labels: jax.Array, keys: jax.Array | None) -> bool:
    """Whether a loss should be computed without them: of long recordings, without a gradient."""
    return keys is None and 2 * math.prod(logits.shape[:2]) * labels.shape[1] > _STREAMED


def from_forward(
    init: Callable,
    forward: Callable,
    decode: Callable,
    augment: SpecAugmentConfig | None,
    config: Any = None,
) -> Recogniser:
    """What all objectives share.

    forward(params, batch, features, keys or None) -> (losses to train with [b], losses to report
    [b], feasible [b], outputs). decode(params, outputs) -> (tokens, counts). config: the model's,
    if it has one, whose `generator` and `layer_drop_per` count: with "batch" `forward` finds a
    "batch_key" in training batches, the same for all parts of one.
    """
    alike = getattr(config, "layer_drop_per", "part") == "batch"

    def loss(params, batch, key):
        key = drawing(key, config)
        slots = jnp.arange(batch["mask"].shape[0])
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(slots)
        keys, masks = split_keys(keys, 2)
        if alike:
            shared = drawing(batch["batch_key"], config) if "batch_key" in batch else key
            batch = {**batch, "batch_key": fold(shared, Stream.BATCH)}
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
