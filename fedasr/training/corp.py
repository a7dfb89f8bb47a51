"""Recalibration without labels exactly as published: after every sentence of a new day.

Fan et al. (CORP, NeurIPS 2023) and its public program. A sentence is decoded and corrected, which
is its label from then on; then all of the day's sentences so far and those of earlier days are
trained on until the loss is low. `fedasr.training.recalibration` is ours: rarer and longer.

* A batch mixes days sentence by sentence, each through its own day's layer. Sentences are of today
  with probability `today`, drawn with replacement; others are of all earlier days pooled, without
  replacement, pass after pass (the program makes one pass, and goes on with today alone).
* Trained are what is shared and today's layer. The noise is white alone. One optimiser lasts a day.
* Training stops once the mean of the last 10 losses, of so many as there are, is low, but not after
  the first step. The penalty on the parameters counts, and so do noise and dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.data.batching import Bucket, write_example
from fedasr.data.corpus import Example
from fedasr.errors import UserError
from fedasr.federated.client import Params
from fedasr.federated.keras_adam import keras_adam
from fedasr.models import recurrent
from fedasr.models.recogniser import ARRAYS, recurrent_recogniser
from fedasr.models.recurrent import DAY, SHARED, RecurrentConfig
from fedasr.streams import Stream, generator, seed_key
from fedasr.training.days import Scorer, with_day


@dataclass(frozen=True)
class CorpConfig:
    """Defaults are the published values.

    today: share of a batch's sentences that are of today (all, where there is no earlier day).
    batch_size: sentences. steps: at most so many after each sentence. threshold: of the mean of the
    last `window` losses, in nats a sentence, below which training stops, after `least` steps at
    the earliest. white_noise: per bin. learning_rate, eps, grad_clip: of Keras' Adam, after a clip
    of the gradient's norm.
    """

    today: float = 0.6
    batch_size: int = 64
    steps: int = 201
    threshold: float = 4.0
    window: int = 10
    least: int = 2
    white_noise: float = 0.8
    learning_rate: float = 0.01
    eps: float = 0.1
    grad_clip: float = 10.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.window, self.least) < 1 or not 0 < self.today <= 1:
            raise UserError(
                "recalibration: steps, batch_size, window and least must be positive, today in "
                "(0, 1]"
            )


class Labelled(NamedTuple):
    """A sentence to train on. day: whose layer it goes through. example: with "labels"."""

    day: int
    example: Example


class Told(NamedTuple):
    """What became of a sentence. text: as corrected, "" for nothing. losses: of its training."""

    text: str
    losses: tuple[float, ...]


def optimizer_of(config: CorpConfig) -> optax.GradientTransformation:
    """At a constant rate, as in the published recalibration."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        keras_adam(config.learning_rate, eps=config.eps),
    )


def mixed_batch(sentences: Sequence[Labelled], bucket: Bucket) -> dict[str, np.ndarray]:
    """Sentences of any days padded to a batch, with "mask" and each one's "day", int32 [b]."""
    batch: dict[str, np.ndarray] = {}
    for slot, sentence in enumerate(sentences):
        write_example(batch, (slot,), (len(sentences),), sentence.example, bucket, ARRAYS)
    batch["day"] = np.array([sentence.day for sentence in sentences], np.int32)
    return batch


def draws(
    today: Sequence[Labelled],
    past: Sequence[Labelled],
    config: CorpConfig,
    rng: np.random.Generator,
) -> Iterator[list[Labelled]]:
    """Batches of sentences without end; see the module.

    Args:
      today: the day's sentences so far, at least one. past: those of all earlier days.
      rng: of the choice.
    """
    order: list[int] = []
    while True:
        batch = []
        for _ in range(config.batch_size):
            if not past or rng.random() < config.today:
                batch.append(today[int(rng.integers(len(today)))])
                continue
            order = order or rng.permutation(len(past)).tolist()
            batch.append(past[order.pop()])
        yield batch


def mixed_loss(model: RecurrentConfig, config: CorpConfig) -> Callable[..., jax.Array]:
    """loss(stacked parameters, batch of `mixed_batch`, today's number, key), a scalar.

    The mean over the sentences, and the penalty on what is shared and on today's layer.
    """
    noise = {"offset_noise": 0.0, "walk_noise": 0.0, "drift_noise": 0.0, "channel_dropout": 0.0}
    settings: dict[str, Any] = noise | {"white_noise": config.white_noise, "l2": 0.0}
    recogniser = recurrent_recogniser(dataclasses.replace(model, **settings))

    def loss(params, batch, today, key):
        rest = {name: value for name, value in batch.items() if name != "day"}
        own = {**params, DAY: jax.tree.map(lambda a: a[batch["day"]], params[DAY])}
        mean, _ = recogniser.loss(own, rest, key)
        return mean + recurrent.penalty(with_day(params, today), model)

    return loss


def trained_part(params: Params, today: jax.Array | int) -> dict[str, Any]:
    """What a day trains, of stacked parameters: what is shared, and the day's own layer."""
    return {SHARED: params[SHARED], DAY: jax.tree.map(lambda a: a[today], params[DAY])}


def put_back(params: Params, trained: Any, today: jax.Array | int) -> dict[str, Any]:
    """Stacked parameters with what a day has trained in place of their own."""
    layers = jax.tree.map(lambda a, b: jnp.asarray(a).at[today].set(b), params[DAY], trained[DAY])
    return {SHARED: trained[SHARED], DAY: layers}


# step(stacked parameters, optimiser state, batch, today's number, key) -> (.., .., loss)
Step = Callable[..., tuple[Params, Any, jax.Array]]


def make_step(
    model: RecurrentConfig, config: CorpConfig, optimizer: optax.GradientTransformation
) -> Step:
    """A compiled step on a batch of `mixed_batch`.

    Args:
      model, config: see `mixed_loss`.
      optimizer: of `trained_part` alone: the gradient of nothing else counts in its norm.
    """
    loss = mixed_loss(model, config)

    def step(params, state, batch, today, key):
        trained = trained_part(params, today)
        value, grads = jax.value_and_grad(
            lambda t: loss(put_back(params, t, today), batch, today, key)
        )(trained)
        updates, state = optimizer.update(grads, state, trained)
        return put_back(params, optax.apply_updates(trained, updates), today), state, value

    return jax.jit(step)


def trained_on(
    step: Step,
    params: Params,
    state: Any,
    batches: Iterator[dict[str, np.ndarray]],
    day: int,
    config: CorpConfig,
    key: jax.Array,
) -> tuple[Params, Any, list[float]]:
    """Steps until the loss is low enough: (parameters, optimiser state, losses).

    Args:
      step: of `make_step`. params, state: to start from. batches: as many as may be taken.
      day: today's number. key: of noise and dropout; each step folds in its number.
    """
    losses: list[float] = []
    while len(losses) < config.steps:
        now = jax.random.fold_in(key, len(losses))
        params, state, value = step(params, state, next(batches), jnp.int32(day), now)
        losses.append(float(value))
        low = float(np.mean(losses[-config.window :])) < config.threshold
        if low and len(losses) >= config.least:
            break
    return params, state, losses


def recalibrate_day(
    step: Step,
    optimizer: optax.GradientTransformation,
    params: Params,
    day: int,
    arriving: Sequence[Example],
    past: Sequence[Labelled],
    scorer: Scorer,
    correct: Callable[[np.ndarray], str],
    encode: Callable[[str], np.ndarray],
    bucket: Bucket,
    config: CorpConfig,
    seed: int,
) -> tuple[Params, list[Labelled], list[Told]]:
    """A day's sentences in the order in which they come: each is decoded, then trained on.

    Args:
      step, optimizer: of `make_step`; the optimiser starts afresh.
      params: stacked; today's layer is set (`fedasr.training.days.set_day`).
      arriving: hold "features"; labels are not read.
      past: of all earlier days.
      scorer: of single sentences, all of which fit in `bucket`.
      correct: from log probabilities to text. encode: from text to labels. Where nothing is
        decoded the label is a space, as in the public program.
      seed: of the choice of sentences, noise and dropout, with the day and the sentence's number.

    Returns:
      The parameters, the day's sentences with their labels (but for such as are longer than a batch
      has room for), and what became of each.
    """
    state = optimizer.init(trained_part(params, day))
    root = jax.random.fold_in(seed_key(seed, Stream.CALIBRATION), day)
    today: list[Labelled] = []
    told: list[Told] = []
    for number, example in enumerate(arriving):
        (scores,) = scorer(with_day(params, day), [example])
        text = correct(scores)
        labels = encode(text or " ")
        if len(labels) <= bucket["labels"]:
            today.append(Labelled(day, {"features": example["features"], "labels": labels}))
        losses: list[float] = []
        if today:
            rng = generator(Stream.CALIBRATION, seed, day, number)
            batches = (mixed_batch(picked, bucket) for picked in draws(today, past, config, rng))
            key = jax.random.fold_in(root, number)
            params, state, losses = trained_on(step, params, state, batches, day, config, key)
        told.append(Told(text, tuple(losses)))
    return params, today, told
