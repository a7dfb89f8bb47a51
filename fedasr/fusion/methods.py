"""M2N2 and what it is compared with, under one interface and one budget of evaluations.

All that a method knows of the task is `score(params) -> float32 [points]`, at least 0 and at most
1, a function that JAX can compile. Scores must always be of the same points.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError
from fedasr.fusion import archive as archives
from fedasr.fusion import competition
from fedasr.fusion.archive import Archive
from fedasr.fusion.competition import Capacity
from fedasr.fusion.crossover import (
    chromosome_sizes,
    crossover,
    leaf_chromosomes,
    mutate,
    split_points,
)

PyTree = Any
Score = Callable[[PyTree], jax.Array]


class Method(NamedTuple):
    """A search over models as pure functions; `State` is any pytree.

    init(parents, key) -> State. parents: models side by side, every leaf [parents, ...].
    step(State, key, index) -> State: `batch` evaluations; index int32 counts steps from 0.
    best(State) -> the model with the highest mean score so far, as far as the method remembers.
    scores(State) -> (float32 [models, points], filled bool [models]): of the models that it holds.
    lowest(State) -> float32, the least score that it has met, or 0: see `archive.refuse_negative`.

    The same search where scores come from outside JAX (see `fedasr.fusion.outside`):
    start(parents, scores float32 [parents, points], key) -> State, instead of init.
    propose(State, key, index) -> models side by side, leaves [batch, ...].
    accept(State, models, scores float32 [batch, points], key, index) -> State: with the key and
    index that the models were proposed with. step is propose, `score` and accept.
    """

    init: Callable[[PyTree, jax.Array], Any]
    step: Callable[[Any, jax.Array, jax.Array], Any]
    best: Callable[[Any], PyTree]
    scores: Callable[[Any], tuple[jax.Array, jax.Array]]
    batch: int = 1
    lowest: Callable[[Any], jax.Array] = lambda state: getattr(state, "lowest", jnp.zeros(()))
    start: Callable[[PyTree, jax.Array, jax.Array], Any] | None = None
    propose: Callable[[Any, jax.Array, jax.Array], PyTree] | None = None
    accept: Callable[..., Any] | None = None


def first_of(models: PyTree) -> PyTree:
    """The first of models side by side, leaves [models, ...]."""
    return jax.tree.map(lambda x: x[0], models)


def alone(model: PyTree) -> PyTree:
    """A model as the only one side by side, leaves [1, ...]."""
    return jax.tree.map(lambda x: x[None], model)


# ------------------------------------------------------------------------------------------ M2N2


@dataclasses.dataclass(frozen=True)
class Evolution:
    """How an archive evolves; the defaults are M2N2's from scratch.

    Attributes:
      population: models in the archive.
      alpha: exponent of competition; 0: none.
      capacity: of data points, see `competition.point_weights`.
      attraction: the second parent is drawn by `competition.attraction`; otherwise by fitness, like
        the first.
      merge: children have two parents; otherwise one.
      split: with a split point; otherwise merged whole.
      mutation: standard deviation of the noise on every parameter of a child; 0: none, as published
        for parents that are already trained.
      chromosome: from a leaf's path to the group that it is merged with, see `leaf_chromosomes`.

    Raises:
      UserError: for values out of range, or children that would equal their parent.
    """

    population: int = 20
    alpha: float = 1.0
    capacity: Capacity = "max"
    attraction: bool = True
    merge: bool = True
    split: bool = True
    mutation: float = 0.01
    chromosome: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.population < 2:
            raise UserError(f"population={self.population}: merging needs at least 2")
        if self.alpha < 0 or self.mutation < 0:
            raise UserError(f"alpha={self.alpha}, mutation={self.mutation}: neither may be below 0")
        if not self.merge and not self.mutation:
            raise UserError("without crossover and without mutation children equal their parent")
        if self.capacity not in competition.CAPACITIES:
            raise UserError(
                f"capacity must be one of {competition.CAPACITIES}, not {self.capacity!r}"
            )


class Pair(NamedTuple):
    """What a child is made of.

    parents: slots of A and B, int32 each. ratio: float32 [chromosomes]. split: int32
    [chromosomes], in units of `crossover.split_unit`.
    """

    parents: tuple[jax.Array, jax.Array]
    ratio: jax.Array
    split: jax.Array


def choose(
    evolution: Evolution,
    scores: jax.Array,
    filled: jax.Array,
    key: jax.Array,
    sizes: tuple[int, ...],
) -> Pair:
    """Draws two parents, mixing ratios and split points.

    Parent A by shared fitness. Parent B by attraction; where nobody is better than A anywhere, by
    fitness among the others. Where all scores are 0, any model.

    Args:
      evolution: the rules. scores, filled: of the archive, with at least one model. key: of this
        child. sizes: of the chromosomes.
    """
    uniform = jax.random.uniform(key, (2 + 2 * len(sizes),))
    fit = competition.fitness(scores, evolution.alpha, evolution.capacity)
    anybody = filled.astype(jnp.float32)
    first = competition.draw(competition.first_positive(fit, anybody), uniform[0])
    if evolution.attraction:
        others = jnp.arange(filled.shape[0]) != first
        weights = competition.first_positive(
            competition.attraction(scores, first, evolution.capacity),
            fit * others,
            anybody * others,
            anybody,
        )
    else:
        weights = competition.first_positive(fit, anybody)
    second = competition.draw(weights, uniform[1])
    return Pair((first, second), *_cut(evolution, uniform[2:], sizes))


def _cut(
    evolution: Evolution, uniform: jax.Array, sizes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Mixing ratios and split points from uniform [2 chromosomes]."""
    ratio, position = jnp.split(uniform, 2)
    points = jnp.array([split_points(size) for size in sizes], jnp.int32)
    if evolution.split:
        return ratio, jnp.minimum((position * points).astype(jnp.int32), points - 1)
    return ratio, points


def breed(
    evolution: Evolution,
    a: PyTree,
    b: PyTree,
    pair: Pair,
    key: jax.Array,
    chromosomes: tuple[int, ...],
) -> PyTree:
    """The child of models a and b.

    Args:
      evolution: the rules. pair: from `choose`. key: of the mutation. chromosomes: of every leaf.
    """
    child = a
    if evolution.merge:
        child = crossover(a, b, pair.ratio, pair.split, chromosomes)
    return mutate(child, key, evolution.mutation)


def keys(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of a child's choices and of its mutation."""
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def _make_child(
    evolution: Evolution, population: Archive, weights: Callable[..., Pair], key: jax.Array
) -> PyTree:
    like = archives.take(population, 0)
    chromosomes = leaf_chromosomes(like, evolution.chromosome)
    choice, noise = keys(key)
    pair = weights(choice, chromosome_sizes(like, chromosomes))
    a, b = (archives.take(population, slot) for slot in pair.parents)
    return breed(evolution, a, b, pair, noise, chromosomes)


def _of_archive(
    score: Score,
    slots: int,
    place: Callable[[Archive, PyTree, jax.Array], Archive],
    propose: Callable[[Archive, jax.Array], PyTree],
) -> Method:
    """A method with an archive.

    Args:
      score: see the module. slots: of the archive. place: puts a model into it, or not, by its
        scores as they are cleaned. propose: a child, from the archive and a key.
    """

    def insert(population, child, scores):
        lowest = jnp.minimum(population.lowest, archives.lowest(scores))
        return place(population, child, archives.clean(scores))._replace(lowest=lowest)

    def init(parents, key):
        del key
        like = first_of(parents)
        begin = archives.empty(like, slots, jax.eval_shape(score, like).shape[0])
        body = lambda s, child: (insert(s, child, score(child)), None)  # noqa: E731
        return jax.lax.scan(body, begin, parents)[0]

    def start(parents, scores, key):
        del key
        begin = archives.empty(first_of(parents), slots, scores.shape[1])
        return jax.lax.scan(lambda s, x: (insert(s, *x), None), begin, (parents, scores))[0]

    def step(population, key, index):
        del index
        child = propose(population, key)
        return insert(population, child, score(child))

    def accept(population, models, scores, key, index):
        del key, index
        return insert(population, first_of(models), scores[0])

    return Method(
        init,
        step,
        _best_of_archive,
        _scores_of_archive,
        start=start,
        propose=lambda population, key, index: alone(propose(population, key)),
        accept=accept,
    )


def evolve(score: Score, evolution: Evolution) -> Method:
    """M2N2 and its ablations: one child a step, dropped or put in the place of the least fit.

    Args:
      score: see the module. evolution: the rules.
    """

    def place(population, child, scores):
        slot = archives.loser(
            population.scores, population.filled, scores, evolution.alpha, evolution.capacity
        )
        return archives.replace(population, slot, child, scores)

    def propose(population, key):
        def pair(choice, sizes):
            return choose(evolution, population.scores, population.filled, choice, sizes)

        return _make_child(evolution, population, pair, key)

    return _of_archive(score, evolution.population, place, propose)


def _best_of_archive(population: Archive) -> PyTree:
    return archives.take(population, archives.best(population))


def _scores_of_archive(population: Archive) -> tuple[jax.Array, jax.Array]:
    return population.scores, population.filled


# ------------------------------------------------------------------------------------ MAP-Elites


def choose_elites(
    evolution: Evolution,
    scores: jax.Array,
    filled: jax.Array,
    key: jax.Array,
    sizes: tuple[int, ...],
    again_below: float = 0.0,
) -> Pair:
    """Draws two parents by quality (mean score) without replacement, mixing ratios, split points.

    Where all that is left has quality 0, any of them; a model alone is its own partner.

    Args:
      evolution: `split` is used. scores, filled: of the grid. key: of this child. sizes: of the
        chromosomes.
      again_below: with replacement as long as the qualities of all models sum to less.
    """
    uniform = jax.random.uniform(key, (2 + 2 * len(sizes),))
    anybody = filled.astype(jnp.float32)
    quality = jnp.where(filled, scores.mean(1), 0.0)
    weights = competition.first_positive(quality, anybody)
    first = competition.draw(weights, uniform[0])
    others = jnp.arange(filled.shape[0]) != first
    apart = competition.first_positive(quality * others, anybody * others, anybody)
    weights = jnp.where(quality.sum() < again_below, weights, apart)
    second = competition.draw(weights, uniform[1])
    return Pair((first, second), *_cut(evolution, uniform[2:], sizes))


def map_elites(
    score: Score,
    descriptor: Callable[[jax.Array], jax.Array],
    cells: int = 10,
    evolution: Evolution = Evolution(),
    again_below: float = 0.0,
) -> Method:
    """MAP-Elites: a grid of models, each the best of its cell; parents by `choose_elites`.

    Args:
      score: see the module.
      descriptor: from scores [points] to float32 [2] in [0, 1], the place in the grid.
      cells: of the grid along each side.
      evolution: `merge`, `split`, `mutation` and `chromosome` of the children; the rest is unused.
      again_below: of `choose_elites`; 2 in the public code of arXiv 2508.16204.
    """

    def place(population, child, scores):
        cell = jnp.clip((descriptor(scores) * cells).astype(jnp.int32), 0, cells - 1)
        slot = cell[0] * cells + cell[1]
        better = scores.mean() > population.scores[slot].mean()
        wins = better | ~population.filled[slot]
        return archives.replace(population, jnp.where(wins, slot, cells * cells), child, scores)

    def propose(population, key):
        def pair(choice, sizes):
            grid = population.scores, population.filled
            return choose_elites(evolution, *grid, choice, sizes, again_below)

        return _make_child(evolution, population, pair, key)

    return _of_archive(score, cells * cells, place, propose)


def halves(mask: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """A descriptor for MAP-Elites: mean scores on the points of a mask and on the others.

    Args:
      mask: bool [points], with points of both kinds.

    Raises:
      UserError: if all points are of one kind.
    """
    mask = np.asarray(mask, bool)
    if mask.all() or not mask.any():
        raise UserError("MAP-Elites' two halves of the data points need at least one point each")
    shares = jnp.array(np.stack([mask / mask.sum(), ~mask / (~mask).sum()]), jnp.float32)
    return lambda scores: jnp.sum(shares * scores, axis=1)


def score_all(score: Score, models: PyTree) -> jax.Array:
    """Scores of models side by side, leaves [models, ...]: float32 [models, points].

    Args:
      score: see the module.
    """
    # Vmapped matrix products of a CPU are slower than one after the other.
    return jax.lax.platform_dependent(
        models, cpu=functools.partial(jax.lax.map, score), default=jax.vmap(score)
    )


# ---------------------------------------------------------------------------------------- names


def make_evolution(name: str, evolution: Evolution) -> Evolution:
    """The rules of an ablation.

    Args:
      name: a key of `ABLATIONS`. evolution: of M2N2.

    Raises:
      UserError: if the ablation leaves nothing that changes a model.
    """
    return dataclasses.replace(evolution, **ABLATIONS[name])


ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "m2n2": {},
    "no_split": {"split": False},
    "no_attraction": {"attraction": False},
    "no_crossover": {"merge": False},
    "ga": {"alpha": 0.0, "attraction": False},
}
