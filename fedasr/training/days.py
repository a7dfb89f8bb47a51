"""Central training on recording days: a layer for each day, the rest shared, one day per batch.

Parameters are those of one day (`fedasr.models.recurrent`), with the day's layers stacked:
{"day": {"kernel" [days, c, c], "bias" [days, c]}, "shared": {...}}. A batch names its day in
"day", int32 [batch], the same number in every slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.data.batching import Bucket, write_example
from fedasr.data.corpus import Corpus, Example
from fedasr.errors import UserError
from fedasr.federated.client import Loss, Params
from fedasr.models import recurrent
from fedasr.models.recogniser import ARRAYS
from fedasr.models.recurrent import DAY, RecurrentConfig
from fedasr.streams import Stream, generator


def with_day(params: Params, day: jax.Array | int) -> Params:
    """Parameters of one day, from stacked ones."""
    return {**params, DAY: jax.tree.map(lambda a: a[day], params[DAY])}


def stack_days(params: Params, days: int) -> Params:
    """The parameters of one day with its layer repeated for so many days."""
    layers = jax.tree.map(lambda a: jnp.broadcast_to(a, (days, *a.shape)), params[DAY])
    return {**params, DAY: layers}


def set_day(params: Params, day: int, like: int | Sequence[int] | None) -> Params:
    """Stacked parameters in which a day's layer starts anew.

    Args:
      params: stacked.
      day: which.
      like: the day that it copies, the days whose mean it takes, or None for the identity.
    """
    if like is None:
        prototype = {
            "kernel": jnp.eye(params[DAY]["kernel"].shape[-1]),
            "bias": jnp.zeros(params[DAY]["bias"].shape[-1]),
        }
    else:
        rows = np.atleast_1d(np.asarray(like))
        prototype = jax.tree.map(lambda a: a[rows].mean(axis=0), params[DAY])
    layers = jax.tree.map(lambda a, b: jnp.asarray(a).at[day].set(b), params[DAY], prototype)
    return {**params, DAY: layers}


def by_day(loss: Loss) -> Loss:
    """The loss of stacked parameters on a batch of one day, from that of one day's."""

    def stacked(params, batch, key):
        rest = {name: value for name, value in batch.items() if name != "day"}
        return loss(with_day(params, batch["day"][0]), rest, key)

    return stacked


def day_batch(
    examples: Sequence[Example], day: int, bucket: Bucket, slots: int
) -> dict[str, np.ndarray]:
    """Pads sentences of one day to a batch of `slots`, with "mask" and "day"."""
    batch: dict[str, np.ndarray] = {}
    for slot, example in enumerate(examples):
        write_example(batch, (slot,), (slots,), example, bucket, ARRAYS)
    batch["day"] = np.full(slots, day, np.int32)
    return batch


class DayData(NamedTuple):
    """Sentences of one day. day: its number among the stacked layers. examples: at least one."""

    day: int
    examples: Sequence[Example]


def days_of(corpus: Corpus, days: Sequence[str]) -> dict[int, DayData]:
    """The days of a corpus, read into memory.

    Args:
      corpus: whose users are days.
      days: the names of all days. A day's number is its place here, in every split alike, whether
        or not that split has sentences of all days.

    Returns:
      The days that have sentences, by number and in that order.

    Raises:
      UserError: a day of the corpus has no place.
    """
    numbers = {name: number for number, name in enumerate(days)}
    if unknown := [name for name in corpus.users if name not in numbers]:
        raise UserError(f"days without a number: {unknown}")
    found = {
        numbers[name]: corpus.get(user, range(int(corpus.sizes[user])))
        for user, name in enumerate(corpus.users)
    }
    return {number: DayData(number, found[number]) for number in sorted(found)}


def random_batch(
    rng: np.random.Generator, data: DayData, bucket: Bucket, batch_size: int
) -> dict[str, np.ndarray]:
    """Sentences of a day, drawn without replacement; all of them where there are too few."""
    count = min(batch_size, len(data.examples))
    picked = rng.choice(len(data.examples), count, replace=False)
    return day_batch([data.examples[i] for i in picked], data.day, bucket, batch_size)


def batches(
    days: Sequence[DayData], bucket: Bucket, batch_size: int, seed: int, steps: int
) -> Iterator[dict[str, np.ndarray]]:
    """A day at random and sentences of it at random, for each step; a function of (seed, step)."""
    for step in range(steps):
        rng = generator(Stream.DAYS, seed, step)
        yield random_batch(rng, days[int(rng.integers(len(days)))], bucket, batch_size)


def published_optimizer(
    learning_rate: float, steps: int | None, grad_clip: float = 10.0
) -> optax.GradientTransformation:
    """Adam with the published epsilon, 0.1, after a clip of the gradient's norm.

    Epsilon is where optax and PyTorch have it; the original program's is Keras'
    (`fedasr.federated.keras_adam`), and its rate falls over more steps than it trains: the recipe
    `neural` has both.

    Args:
      learning_rate: at the first step. steps: after which it has fallen to 0, linearly; None for a
        constant rate. grad_clip: largest norm.
    """
    rate: Any = learning_rate
    if steps is not None:
        rate = optax.linear_schedule(learning_rate, 0.0, steps)
    return optax.chain(optax.clip_by_global_norm(grad_clip), optax.adam(rate, eps=0.1))


# step(params, optimiser state, batch, key) -> (params, optimiser state, loss)
Step = Callable[[Params, Any, Any, jax.Array], tuple[Params, Any, jax.Array]]


def make_step(loss: Loss, optimizer: optax.GradientTransformation, day_only: bool = False) -> Step:
    """A compiled training step on one batch.

    Args:
      loss: `by_day(...)`, or that of one day for parameters that are not stacked.
      optimizer: of all parameters.
      day_only: leave what is shared as it is.
    """

    def step(params, state, batch, key):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        if day_only:
            zeros = {name: jax.tree.map(jnp.zeros_like, grads[name]) for name in grads}
            grads = {**zeros, DAY: grads[DAY]}
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step)


def train(
    step: Step,
    params: Params,
    state: Any,
    items: Iterable[dict[str, np.ndarray]],
    key: jax.Array,
    until: Callable[[list[float]], bool] | None = None,
) -> tuple[Params, list[float]]:
    """Takes steps until the batches end.

    Args:
      step: of `make_step`. params: to start from. state: the optimiser's. items: batches.
      key: of noise and dropout; each step folds in its number.
      until: asked after each step with the losses so far; True ends the training.

    Returns:
      The parameters, and the loss of every step.
    """
    values: list[Any] = []
    for number, batch in enumerate(items):
        params, state, value = step(params, state, batch, jax.random.fold_in(key, number))
        # Reading the loss waits for the device: only where someone asks.
        values.append(value if until is None else float(value))
        if until is not None and until(values):
            break
    return params, [float(v) for v in jax.device_get(values)]


class Scorer:
    """Log probabilities of tokens for sentences of one day.

    Args:
      config: of the model. bucket: that every sentence fits in. batch_size: sentences at a time.
    """

    def __init__(self, config: RecurrentConfig, bucket: Bucket, batch_size: int = 16) -> None:
        self._bucket, self._batch_size = bucket, batch_size

        @jax.jit
        def score(params, features, lengths):
            logits, lengths = recurrent.forward(params, features, lengths, None, config)
            return jax.nn.log_softmax(logits), lengths

        self._score = score

    def __call__(self, params: Params, examples: Sequence[Example]) -> list[np.ndarray]:
        """Scores with the parameters of one day: float32 [frames, vocab] for each sentence.

        Raises:
          UserError: no sentence.
        """
        if not examples:
            raise UserError("there are no sentences to decode")
        found = []
        for start in range(0, len(examples), self._batch_size):
            part = examples[start : start + self._batch_size]
            batch = day_batch(part, 0, self._bucket, self._batch_size)
            out = self._score(params, batch["features"], batch["features_length"])
            scores, lengths = jax.device_get(out)
            found += [s[:n] for s, n in zip(scores, lengths, strict=True)][: len(part)]
        return found


def greedy_labels(log_probs: np.ndarray) -> np.ndarray:
    """The best token of each frame, repeats and then blanks removed: int32 [labels]."""
    best = log_probs.argmax(axis=-1)
    return best[(np.diff(best, prepend=-1) != 0) & (best != 0)].astype(np.int32)
