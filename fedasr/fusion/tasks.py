"""What models are merged for, and the methods by name: what the programs share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.data.records import open_corpus
from fedasr.errors import UserError
from fedasr.fusion import METHODS, baselines, digits, methods, recognisers
from fedasr.training.checkpoint import restore_params


@dataclasses.dataclass(frozen=True)
class Task:
    """What a search needs to know.

    Attributes:
      score: see `fedasr.fusion.methods`. make_parents, measure: see `fedasr.fusion.run`.
      like: shapes of a model. base: what the parents were trained from, or None if unknown.
      mutation: standard deviation. halves: bool [points], for MAP-Elites. identity: of the data
      and models. chromosome: of `methods.Evolution`. again_below: of `methods.choose_elites`.
    """

    score: Callable[[Any], Any]
    make_parents: Callable[[Any], Any]
    measure: Callable[[Any], Mapping[str, Any]]
    like: Any
    base: Any
    mutation: float
    halves: np.ndarray
    identity: Mapping[str, Any]
    chromosome: Callable[[str], str] | None = None
    again_below: float = 0.0


def digits_task(pretrained: bool, raw: bool = False, pair_per_seed: bool = False) -> Task:
    """The published test bed.

    Args:
      pretrained: two specialists without mutation, otherwise two random models with.
      raw: images as published, see `fedasr.fusion.digits.load`.
      pair_per_seed: every seed trains specialists of its own; otherwise all start from the
        published pair.

    Raises:
      UserError: if scikit-learn is missing.
    """
    data = digits.load(raw)
    like = jax.eval_shape(digits.random_model, jax.random.key(0))

    def trained(key):
        return digits.specialists(key if pair_per_seed else None, data)

    pair = {"pair": "per seed" if pair_per_seed else "published"} if pretrained else {}
    return Task(
        digits.train_scores(data),
        trained if pretrained else digits.scratch_parents,
        digits.test_accuracy(data),
        like,
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like),
        0.0 if pretrained else 0.01,
        data.train_labels % 2 == 1,
        {"task": "digits", "pretrained": pretrained, "raw": raw, **pair},
        again_below=2.0,  # as the public code has it
    )


def recognisers_task(
    parents: recognisers.Parents,
    models: Sequence[str | Path],
    data: str | Path,
    split: str,
    by_module: bool = False,
) -> Task:
    """Merging recognisers by the scores of utterances; `measure` measures nothing.

    Args:
      parents: read from `models`. models: their folders. data: a prepared corpus. split: of it,
        to score on. by_module: whether each module of the model (the front end, a block, ...) is a
        chromosome, with a ratio and a split point of its own; otherwise the model is one.
    """
    corpus = open_corpus(data, split, parents.audio)
    start = parents.metadata["config"]["init_from"]
    return Task(
        recognisers.utterance_scores(parents.recogniser, corpus),
        lambda key: jax.tree.map(jnp.asarray, parents.params),
        lambda params: {},
        parents.model(0),
        restore_params(start) if start and Path(start).exists() else None,
        0.0,
        np.arange(int(corpus.sizes.sum())) % 2 == 1,
        {
            "task": "asr",
            "models": [str(Path(path).resolve()) for path in models],
            "data": str(Path(data).resolve()),
            "split": split,
        }
        | ({"by_module": True} if by_module else {}),
        (lambda path: path.split("/")[0]) if by_module else None,
    )


def make_method(name: str, task: Task, population: int = 20, alpha: float = 1.0) -> methods.Method:
    """A method by name.

    Args:
      name: one of `fedasr.fusion.METHODS`. task: to search. population, alpha: of the archive.

    Raises:
      UserError: for an unknown name, or a method that the task has nothing for.
    """
    evolution = methods.Evolution(
        population=population, alpha=alpha, mutation=task.mutation, chromosome=task.chromosome
    )
    if name in methods.ABLATIONS:
        return methods.evolve(task.score, methods.make_evolution(name, evolution))
    if name == "map_elites":
        descriptor = methods.halves(task.halves)
        return methods.map_elites(
            task.score, descriptor, evolution=evolution, again_below=task.again_below
        )
    if name == "cma_es":
        return baselines.cma_es(task.score, task.like, population)
    if name == "mixing_ratio":
        return baselines.mixing_ratio(task.score)
    if name == "average":
        return baselines.uniform_average(task.score)
    if name == "task_arithmetic":
        if task.base is None:
            raise UserError(
                "task_arithmetic needs what all models were trained from: recognisers with one "
                "init_from, or --base=MODEL for checkpoints"
            )
        return baselines.task_arithmetic(task.score, task.base)
    raise UserError(f"--method={name}: choose from {', '.join(METHODS)}")


def spread(values: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation (of a sample) over the last axis, the seeds: floats or lists.

    Args:
      values: float [..., seeds].
    """
    deviation = values.std(-1, ddof=1) if values.shape[-1] > 1 else np.zeros(values.shape[:-1])
    return {"mean": values.mean(-1).tolist(), "std": deviation.tolist()}
