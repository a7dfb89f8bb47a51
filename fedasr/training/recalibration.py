"""Recalibration without labels: a decoder keeps up with drifting recordings by its own output.

Ours; as published it is `fedasr.training.corp`. After Fan et al., "Plug-and-play stability for
intracortical brain-computer interfaces" (CORP, NeurIPS 2023): the sentences of a new day are
decoded and corrected by a language model, and what comes out is trained on as if it were true,
mixed with data of earlier days. A new day's layer starts as a copy of the last day's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from fedasr.data.batching import Bucket
from fedasr.data.corpus import Example
from fedasr.errors import UserError
from fedasr.federated.client import Params
from fedasr.streams import Stream, generator, seed_key
from fedasr.training.days import DayData, Step, random_batch, train


@dataclass(frozen=True)
class RecalibrationConfig:
    """How a decoder is trained for a new day; the published way is `fedasr.training.corp`.

    steps: at most so many. today: probability that a batch is of today, otherwise of an earlier
    day, each alike (0: of earlier days only). batch_size: sentences. threshold, window: training
    stops when the mean of the last `window` losses, those of training with its noise, falls below
    the threshold (nats per sentence).
    """

    steps: int = 200
    today: float = 0.6
    batch_size: int = 48
    threshold: float = 4.0
    window: int = 10

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.window) < 1 or not 0 <= self.today <= 1:
            raise UserError(
                "recalibration: steps, batch_size and window must be positive, today in [0, 1]"
            )


def pseudo_labelled(
    examples: Sequence[Example],
    scores: Sequence[np.ndarray],
    correct: Callable[[np.ndarray], str],
    encode: Callable[[str], np.ndarray],
    longest: int,
) -> list[dict[str, np.ndarray]]:
    """Sentences with what was decoded in place of their labels, which are not read.

    Args:
      examples: hold "features".
      scores: log probabilities of each.
      correct: from log probabilities to text, such as a `BeamDecoder`'s.
      encode: from text to labels, such as `CharTokenizer.encode`.
      longest: most labels that a sentence may have, such as those of the bucket.

    Returns:
      Those for which anything was decoded, and not too much, as {"features", "labels"}.
    """
    found = []
    for example, one in zip(examples, scores, strict=True):
        labels = encode(correct(one))
        if 0 < len(labels) <= longest:
            found.append({"features": example["features"], "labels": labels})
    return found


def mixed_batches(
    today: DayData,
    past: Sequence[DayData],
    config: RecalibrationConfig,
    bucket: Bucket,
    seed: int,
    part: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """`config.steps` batches, each of today or of one earlier day, by (seed, day, part)."""
    rng = generator(Stream.CALIBRATION, seed, today.day, part)
    for _ in range(config.steps):
        now = not past or rng.random() < config.today
        data = today if now else past[int(rng.integers(len(past)))]
        yield random_batch(rng, data, bucket, config.batch_size)


def recalibrate(
    step: Step,
    optimizer: optax.GradientTransformation,
    params: Params,
    today: DayData,
    past: Sequence[DayData],
    bucket: Bucket,
    config: RecalibrationConfig,
    seed: int,
    part: int = 0,
) -> tuple[Params, list[float]]:
    """Trains on a day's labels or pseudo-labels and on earlier days, for a few steps.

    With true labels and a step of `make_step(..., day_only=True)` it is supervised calibration.

    Args:
      step, optimizer: of `fedasr.training.days.make_step`; the optimiser starts afresh.
      params: stacked; today's layer is set (`set_day`).
      today: its sentences with labels to train on; without any the parameters stay.
      past: earlier days; may be empty.
      bucket: that all sentences fit in.
      seed, part: of the choice of sentences, noise and dropout, with the day; `part` numbers the
        trainings of one day.

    Returns:
      The parameters and the losses of the steps taken.
    """
    if not today.examples:
        return params, []

    def done(losses: list[float]) -> bool:
        last = losses[-config.window :]
        return len(last) == config.window and float(np.mean(last)) < config.threshold

    key = seed_key(seed, Stream.CALIBRATION)
    for number in (today.day, part):
        key = jax.random.fold_in(key, number)
    items: Any = mixed_batches(today, past, config, bucket, seed, part)
    return train(step, params, optimizer.init(params), items, key, done)
