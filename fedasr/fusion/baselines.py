"""What M2N2 is compared with that keeps no archive: ratios, averages, task arithmetic, CMA-ES."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.fusion import archive as archives
from fedasr.fusion.crossover import slerp
from fedasr.fusion.methods import Method, PyTree, Score, alone, first_of, keys, score_all


class Incumbent(NamedTuple):
    """The best model so far, its scores float32 [points], and what the candidates are made of.

    lowest: as of an archive.
    """

    best: PyTree
    scores: jax.Array
    parents: PyTree
    lowest: Any = 0.0


def _search(score: Score, candidate: Callable[[PyTree, jax.Array, jax.Array], PyTree]) -> Method:
    """Keeps the best of candidate(parents, key, index)."""

    def init(parents, key):
        first = first_of(parents)
        return start(parents, score(first)[None], key)

    def start(parents, scores, key):
        del key
        return _incumbent(first_of(parents), scores[0], parents)

    def take(state, found, scores):
        lowest = jnp.minimum(state.lowest, archives.lowest(scores))
        scores = archives.clean(scores)
        better = scores.mean() > state.scores.mean()
        keep = functools.partial(jnp.where, better)
        best = jax.tree.map(keep, found, state.best)
        return Incumbent(best, keep(scores, state.scores), state.parents, lowest)

    def step(state, key, index):
        found = candidate(state.parents, key, index)
        return take(state, found, score(found))

    return Method(
        init,
        step,
        lambda state: state.best,
        lambda state: (state.scores[None], jnp.ones(1, bool)),
        start=start,
        propose=lambda state, key, index: alone(candidate(state.parents, key, index)),
        accept=lambda state, models, scores, key, index: take(state, first_of(models), scores[0]),
    )


def _incumbent(model: PyTree, scores: jax.Array, parents: PyTree) -> Incumbent:
    return Incumbent(model, archives.clean(scores), parents, archives.lowest(scores))


def fraction(index: jax.Array) -> jax.Array:
    """The index-th point of van der Corput's sequence in [0, 1): evenly spread at any length.

    Args:
      index: int32, from 0 (0, 1/2, 1/4, 3/4, 1/8 ...).
    """
    bits = index.astype(jnp.uint32)
    digits = [((bits >> i) & 1) << (23 - i) for i in range(24)]
    reverse = functools.reduce(operator.or_, digits)
    return reverse.astype(jnp.float32) / 2**24


def mixing_ratio(score: Score) -> Method:
    """Brute force over the ratio of the parents, without a split point.

    Two parents: SLERP at evenly spread ratios, whatever the budget. More: convex combinations at
    random (uniform on the simplex).

    Args:
      score: see the module.
    """

    def candidate(parents, key, index):
        count = jax.tree.leaves(parents)[0].shape[0]
        if count == 2:
            a, b = (jax.tree.map(lambda x, i=i: x[i], parents) for i in range(2))
            return slerp(a, b, fraction(index))
        return combine(parents, jax.random.dirichlet(key, jnp.ones(count)))

    return _search(score, candidate)


def combine(models: PyTree, weights: jax.Array) -> PyTree:
    """Weighted sum of models: leaves [models, ...], weights float32 [models]."""

    def leaf(x):
        return jnp.einsum(
            "m...,m->...", x.astype(jnp.float32), weights, precision="highest"
        ).astype(x.dtype)

    return jax.tree.map(leaf, models)


def uniform_average(score: Score) -> Method:
    """The mean of the parents ("model soup"): nothing is searched, every step scores it again.

    Args:
      score: see the module.
    """

    def candidate(parents, key, index):
        del key, index
        count = jax.tree.leaves(parents)[0].shape[0]
        return combine(parents, jnp.full(count, 1 / count))

    def init(parents, key):
        mean = candidate(parents, key, 0)
        return _incumbent(mean, score(mean), parents)

    def start(parents, scores, key):
        # Nobody has scored the mean yet: its first scores are those that count.
        return _incumbent(candidate(parents, key, 0), jnp.zeros_like(scores[0]), parents)

    return _search(score, candidate)._replace(init=init, start=start)


def task_arithmetic(score: Score, base: PyTree, largest: float = 2.0) -> Method:
    """base + factor x sum of (parent - base), with the best factor in [0, largest].

    Args:
      score: see the module. base: the model that the parents were trained from. largest: factor.
    """

    def candidate(parents, key, index):
        del key

        def leaf(start, models):
            moved = jnp.sum(models.astype(jnp.float32) - start, axis=0)
            return (start + largest * fraction(index) * moved).astype(models.dtype)

        return jax.tree.map(leaf, base, parents)

    return _search(score, candidate)


# ---------------------------------------------------------------------------------------- CMA-ES


class Sampled(NamedTuple):
    """State of CMA-ES: evosax's, the last population's scores, and the best model so far.

    lowest: as of an archive.
    """

    strategy: Any
    scores: jax.Array
    best: PyTree
    best_scores: jax.Array
    lowest: Any = 0.0


def cma_es(score: Score, like: PyTree, population: int = 20, std: float = 0.01) -> Method:
    """CMA-ES with a diagonal covariance (evosax's Sep-CMA-ES) on all parameters.

    It starts at the mean of the parents. A full covariance matrix has the square of the number of
    parameters in entries, and with the learning rates for so many dimensions it hardly leaves the
    identity within any budget here. It samples in float32, whatever the model's dtypes.

    Args:
      score: see the module. like: a model, or its shapes. population: candidates in a step. std:
        first standard deviation.

    Raises:
      UserError: if evosax is missing.
    """
    try:
        from evosax.algorithms import Sep_CMA_ES
    except ImportError as error:
        raise UserError("CMA-ES needs evosax: pip install 'fedasr[fusion]'") from error
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    strategy = Sep_CMA_ES(population_size=population, solution=example)
    settings = strategy.default_params.replace(std_init=std)

    def wide(models):
        return jax.tree.map(lambda x: x.astype(jnp.float32), models)

    def begin(parents, key):
        count = jax.tree.leaves(parents)[0].shape[0]
        mean = combine(parents, jnp.full(count, 1 / count))
        return mean, strategy.init(key, wide(mean), settings)

    def around(state, best, scores):
        lowest, scores = archives.lowest(scores), archives.clean(scores)
        spread = jnp.broadcast_to(scores, (population, scores.size))
        return Sampled(state, spread, best, scores, lowest)

    def init(parents, key):
        mean, state = begin(parents, key)
        return around(state, mean, score(mean))

    def start(parents, scores, key):
        # Nobody has scored the mean: the best model so far is a parent.
        top = jnp.argmax(archives.clean(scores).mean(1))
        _, state = begin(parents, key)
        return around(state, jax.tree.map(lambda x: x[top], parents), scores[top])

    def propose(state, key, index):
        del index
        models, _ = strategy.ask(keys(key)[0], state.strategy, settings)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), models, like)

    def accept(state, models, scores, key, index):
        del index
        ask, tell = keys(key)
        _, strategy_state = strategy.ask(ask, state.strategy, settings)
        lowest = jnp.minimum(state.lowest, archives.lowest(scores))
        scores = archives.clean(scores)
        means = scores.mean(1)
        strategy_state, _ = strategy.tell(tell, wide(models), -means, strategy_state, settings)
        top = jnp.argmax(means)
        keep = functools.partial(jnp.where, means[top] > state.best_scores.mean())
        best = jax.tree.map(lambda new, old: keep(new[top], old), models, state.best)
        return Sampled(strategy_state, scores, best, keep(scores[top], state.best_scores), lowest)

    def step(state, key, index):
        models = propose(state, key, index)
        return accept(state, models, score_all(score, models), key, index)

    return Method(
        init,
        step,
        lambda state: state.best,
        lambda state: (state.scores, jnp.ones(population, bool)),
        population,
        start=start,
        propose=propose,
        accept=accept,
    )
