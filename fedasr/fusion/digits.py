"""The published test bed: an MLP on scikit-learn's 8 x 8 digits, from scratch or two specialists.

The specialists are the published pair, or a pair for each seed. The first 80% of the 1,797 images
train, the rest test, in their order. The MLP has 64 inputs, 256 rectified units and 10 outputs:
19,210 parameters.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.errors import UserError

PyTree = Any
PIXELS, UNITS, CLASSES = 64, 256, 10
_SHAPES = ((PIXELS, UNITS), (UNITS,), (UNITS, CLASSES), (CLASSES,))
_TRAIN_SHARE = 0.8
_STEPS, _LEARNING_RATE = 10, 3e-3  # of a specialist's training, Adam on all its images


class Layer(NamedTuple):
    """A layer's parameters in the published order, in which a model is one vector."""

    kernel: Any
    bias: Any


class MLP(NamedTuple):
    """hidden: kernel float32 [64, 256], bias [256]. output: kernel [256, 10], bias [10]."""

    hidden: Layer
    output: Layer


class Digits(NamedTuple):
    """images float32 [n, 64], labels int32 [n], of both parts."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(raw: bool = False) -> Digits:
    """The data set, from scikit-learn's own copy.

    Args:
      raw: pixels of 0 to 16, as published; otherwise less their mean over the training images.

    Raises:
      UserError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits need scikit-learn: pip install 'fedasr[fusion]'") from error
    data = load_digits()
    # Not scaled: at 1/16 the random output biases drown a random model's logits, and evolution from
    # scratch takes several times the published number of evaluations.
    images, labels = data.data.astype(np.float32), data.target.astype(np.int32)
    train = int(_TRAIN_SHARE * len(labels))
    if not raw:
        # What all images have in common tells no digit, but most of a mutation's effect is on it.
        images -= images[:train].mean(0)
    return Digits(images[:train], labels[:train], images[train:], labels[train:])


def random_model(key: jax.Array, std: float = 0.01) -> MLP:
    """An MLP whose parameters are all N(0, std^2).

    Args:
      key: of the draw. std: standard deviation.
    """
    drawn = [
        std * jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate(_SHAPES)
    ]
    return MLP(Layer(*drawn[:2]), Layer(*drawn[2:]))


def logits(params: MLP, images: jax.Array) -> jax.Array:
    """float32 [n, 10].

    Args:
      params: of the MLP. images: float32 [n, 64].
    """
    hidden = jax.nn.relu(images @ params.hidden.kernel + params.hidden.bias)
    return hidden @ params.output.kernel + params.output.bias


def correct(params: MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the MLP is right, else 0: float32 [n].

    Args:
      params: of the MLP. images: float32 [n, 64]. labels: int32 [n].
    """
    return (logits(params, images).argmax(-1) == labels).astype(jnp.float32)


def scratch_parents(key: jax.Array) -> PyTree:
    """Two random models, leaves [2, ...].

    Args:
      key: of the draw.
    """
    return jax.vmap(random_model)(jax.random.split(key))


def published_starts() -> PyTree:
    """Where the published pair of specialists starts, the same in every run: leaves [2, ...].

    The public code's draw from key 42, each model as one vector. It is JAX's: releases before 0.5,
    which the authors had, draw other numbers unless jax_threefry_partitionable is set, and this one
    draws theirs where it is not.
    """

    def model(key):
        flat = 0.01 * jax.random.normal(key, (sum(map(math.prod, _SHAPES)),))
        ends = list(itertools.accumulate(map(math.prod, _SHAPES)))[:-1]
        parts = [x.reshape(s) for x, s in zip(jnp.split(flat, ends), _SHAPES, strict=True)]
        return MLP(Layer(*parts[:2]), Layer(*parts[2:]))

    return jax.tree.map(lambda *x: jnp.stack(x), *map(model, jax.random.split(jax.random.key(42))))


def specialists(key: jax.Array | None, digits: Digits) -> PyTree:
    """Two models trained for ten steps, on digits 0-4 and on 5-9: leaves [2, ...].

    Args:
      key: of their starting points; None for `published_starts`. digits: the data.
    """
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    low = labels < 5
    optimizer = optax.adam(_LEARNING_RATE)

    def train(params, chosen):
        def loss(p):
            losses = optax.softmax_cross_entropy_with_integer_labels(logits(p, images), labels)
            return jnp.sum(losses * chosen) / jnp.sum(chosen)

        def step(carry, _):
            p, state = carry
            updates, state = optimizer.update(jax.grad(loss)(p), state)
            return (optax.apply_updates(p, updates), state), None

        start = (params, optimizer.init(params))
        return jax.lax.scan(step, start, None, length=_STEPS)[0][0]

    starts = published_starts() if key is None else scratch_parents(key)
    trained = [
        train(jax.tree.map(lambda x, i=i: x[i], starts), chosen)
        for i, chosen in enumerate((low, ~low))
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *trained)


def train_scores(digits: Digits) -> Any:
    """`score` of the training images for `fedasr.fusion.methods`.

    Args:
      digits: the data.
    """
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    return functools.partial(correct, images=images, labels=labels)


def test_accuracy(digits: Digits) -> Any:
    """`measure` for `fedasr.fusion.run`: {"test_accuracy": percent}.

    Args:
      digits: the data.
    """
    images, labels = jnp.asarray(digits.test_images), jnp.asarray(digits.test_labels)
    return lambda params: {"test_accuracy": 100 * correct(params, images, labels).mean()}
