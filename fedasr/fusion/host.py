"""M2N2 with the archive in the host's memory, for large models and for scores that are no JAX code.

Only the two parents, the child and the table of scores are on the device. Memory: with P models of
n parameters of b bytes and N points, the device-resident archive (`methods.evolve`) holds
(P + 3) n b + 4 P N bytes (archive, two parents, child), and 4 n more while it mutates; here it is
3 n b + 4 P N on the device and P n b on the host. For P = 8, n = 130e6, b = 4 that is 5.7 GB on the
device, or 1.6 GB and 4.2 GB on the host: an 80 GB device needs no host archive for it, whatever
scoring takes beside it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fedasr.fusion import archive as archives
from fedasr.fusion import methods
from fedasr.fusion.archive import Archive
from fedasr.fusion.crossover import chromosome_sizes, leaf_chromosomes
from fedasr.fusion.methods import Evolution

PyTree = Any


def start(score: Callable[[PyTree], Any], evolution: Evolution, parents: list[PyTree]) -> Archive:
    """An archive of numpy arrays with the parents in it.

    Args:
      score: from a model on the device to [points]; any Python.
      evolution: the rules. parents: models, on the host.

    Raises:
      UserError: a score below 0, here and at every step.
    """
    first = np.asarray(score(jax.device_put(parents[0])))
    population = jax.tree.map(
        lambda x: np.zeros((evolution.population, *x.shape), x.dtype), parents[0]
    )
    scores: Any = np.zeros((evolution.population, first.shape[0]), np.float32)  # on the host, too
    filled: Any = np.zeros(evolution.population, bool)
    archive = Archive(population, scores, filled, np.zeros((), np.float32))
    for model in parents:
        _insert(archive, evolution, model, score(jax.device_put(model)))
    return archive


def steps(
    score: Callable[[PyTree], Any],
    evolution: Evolution,
    archive: Archive,
    key: jax.Array,
    first: int = 0,
) -> Iterator[Archive]:
    """Yields the archive after every evaluation, updated in place, without end.

    With the keys of `fedasr.fusion.run` it is what `methods.evolve` computes.

    Args:
      score: see `start`. evolution: the rules. archive: from `start`, or from a checkpoint.
      key: of the run. first: number of evaluations that the archive has had.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), archive.params)
    chromosomes = leaf_chromosomes(like, evolution.chromosome)
    sizes = chromosome_sizes(like, chromosomes)

    @jax.jit
    def choose(scores, filled, step_key):
        return methods.choose(evolution, scores, filled, methods.keys(step_key)[0], sizes)

    @jax.jit
    def breed(a, b, pair, step_key):
        return methods.breed(evolution, a, b, pair, methods.keys(step_key)[1], chromosomes)

    index = first
    while True:
        step_key = jax.random.fold_in(key, index)
        pair = choose(archive.scores, archive.filled, step_key)
        a, b = (
            jax.device_put(jax.tree.map(lambda x, i=int(slot): x[i], archive.params))
            for slot in pair.parents
        )
        child = breed(a, b, pair, step_key)
        _insert(archive, evolution, child, score(child))
        index += 1
        yield archive


@jax.jit(static_argnames=("alpha", "capacity"))
def _loser(scores, filled, child, alpha, capacity):
    child = archives.clean(child)
    return child, archives.loser(scores, filled, child, alpha, capacity)


def _insert(archive: Archive, evolution: Evolution, model: PyTree, scores: Any) -> None:
    scores = np.asarray(scores, np.float32)
    archives.refuse_negative(np.where(np.isfinite(scores), scores, 0.0))
    child, slot = jax.device_get(
        _loser(archive.scores, archive.filled, scores, evolution.alpha, evolution.capacity)
    )
    if slot == archive.filled.shape[0]:
        return
    for leaf, new in zip(jax.tree.leaves(archive.params), jax.tree.leaves(model), strict=True):
        leaf[slot] = np.asarray(new)
    archive.scores[slot] = child
    archive.filled[slot] = True
