"""Searches whose scores come from outside JAX: any Python, any framework.

The same methods as in `fedasr.fusion.run`, with the same draws: a method proposes a model, it is
scored, the method takes it or drops it. What a method holds lies on one device. On JAX's CPU device
that is the host's memory; an accelerator is left to whoever scores. Memory there, with P models of
n parameters of b bytes: (P + 1) n b for an archive and a child, and what merging takes beside it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError
from fedasr.fusion import archive as archives
from fedasr.fusion.methods import Method
from fedasr.fusion.run import INIT, STEPS, Result, Saved, line_of, observed, record_of

PyTree = Any
# From a model of read-only numpy arrays to [points].
Score = Callable[[PyTree], Any]


def checked(values: Any, points: int | None = None) -> np.ndarray:
    """What a score gave, as float32 [points]; not finite ones stay, they count as 0.

    Args:
      values: array of any framework that NumPy can read. points: that there must be, if known.

    Raises:
      UserError: another shape or number of points, no numbers, or a score outside [0, 1].
    """
    try:
        found = np.asarray(values, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the score gave {type(values).__name__}, which NumPy cannot read ({error}): return "
            "float32 on the host, such as tensor.float().cpu().numpy()"
        ) from error
    if found.ndim != 1 or not found.size:
        raise UserError(
            f"the score must give one number for each data point, [points], not shape {found.shape}"
        )
    if points is not None and found.size != points:
        raise UserError(
            f"the score gave {found.size} numbers, and {points} before: it must always score the "
            "same data points"
        )
    finite = found[np.isfinite(found)]
    archives.refuse_negative(np.append(finite, 0.0))
    if finite.size and finite.max() > 1 + 1e-6:
        raise UserError(
            f"a model has a score of {finite.max():.6g}, but scores lie between 0 and 1: scale "
            "them, such as by the largest that there can be"
        )
    return found


def parent_scores(score: Score, models: Sequence[PyTree], names: Sequence[str]) -> np.ndarray:
    """Scores of the models that a search begins with, float32 [models, points].

    Args:
      score: see `search`. models: of numpy arrays. names: of the models, for messages.

    Raises:
      UserError: what `checked` raises, or a model whose scores are all not finite.
    """
    rows: list[np.ndarray] = []
    for model, name in zip(models, names, strict=True):
        rows.append(checked(score(model), rows[0].size if rows else None))
        if not np.isfinite(rows[-1]).any():
            raise UserError(f"the score of {name} is not finite on any data point")
    return np.stack(rows)


def search(
    method: Method,
    score: Score,
    parents: Sequence[PyTree],
    parent_scores: np.ndarray,
    seed: int,
    evaluations: int,
    *,
    every: int = 100,
    workdir: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_seconds: float = 60.0,
    device: jax.Device | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Result:
    """Searches until there were so many evaluations.

    Args:
      method: what to run; its own score is not used.
      score: from a model of numpy arrays to [points], see `checked`.
      parents: models of numpy arrays, floating point.
      parent_scores: theirs, float32 [parents, points].
      seed: of all that is random here.
      evaluations: those of the parents not counted; rounded up to whole steps of the method.
      every: evaluations between measurements.
      workdir, identity, save_seconds, log: see `fedasr.fusion.run.run`.
      device: that holds the models; default the first.

    Returns:
      Of one seed. Its seconds are those of all steps but the first, which compiles.

    Raises:
      UserError: what `checked` raises, nothing to do, a checkpoint of another run or of a longer
        one, or a work directory that another process works in.
    """
    start, proposing, accepting = _parts(method)
    if min(len(parents), evaluations, every) < 1:
        raise UserError("parents, evaluations and every must be at least one")
    device = device or jax.local_devices()[0]
    total, every = (-(-n // method.batch) for n in (evaluations, every))
    points, usual = parent_scores.shape[1], jax.config.values["jax_default_device"]
    with jax.default_device(device), Saved(workdir, {**(identity or {}), "seed": seed}) as saved:
        propose, accept = jax.jit(proposing), jax.jit(accepting, donate_argnums=0)
        observe = jax.jit(lambda state: observed(method, state))
        root = jax.random.key(seed)
        stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *parents)
        scores = jnp.asarray(parent_scores, jnp.float32)
        state = jax.jit(start)(stacked, scores, jax.random.fold_in(root, INIT))
        del stacked
        done, curve = 0, [record_of(0, observe(state))]
        if found := _restored(saved, state, device):
            state, (done, curve) = found
            if done > total:
                raise UserError(
                    f"{workdir} holds {done * method.batch} evaluations already, more than the "
                    f"{evaluations} asked for: choose another work directory"
                )
            log(f"going on from {done * method.batch} evaluations")
        del found
        keys = jax.random.fold_in(root, STEPS)
        first, began, last_save = done, time.perf_counter(), time.monotonic()
        while done < total:
            key, index = jax.random.fold_in(keys, done), jnp.int32(done)
            models = propose(state, key, index)
            with jax.default_device(usual):  # the score may use JAX, on whatever device it likes
                rows = _scored(score, models, points)
            state = accept(state, models, jnp.asarray(rows), key, index)
            del models
            done += 1
            if done == first + 1:
                began = time.perf_counter()
            if done % every == 0 or done == total:
                curve.append(record_of(done * method.batch, observe(state)))
                log(line_of(curve[-1]))
            if done == total or time.monotonic() - last_save > save_seconds:
                saved.save(done, jax.tree.leaves(state), curve)
                last_save = time.monotonic()
        seconds = time.perf_counter() - began
        best = jax.device_get(jax.jit(method.best)(state))
    return Result(
        jax.tree.map(lambda x: np.asarray(x)[None], best),
        total * method.batch,
        {key: np.array([record[key] for record in curve]) for key in curve[0]},
        seconds,
        max(0, total - first - 1) * method.batch,
    )


def _restored(saved: Saved, state: PyTree, device: jax.Device) -> tuple[PyTree, Any] | None:
    """A state like this on the device, with what was saved beside it; None if nothing was."""
    leaves, structure = jax.tree.flatten(state)
    if not (found := saved.restore(leaves)):
        return None
    return jax.tree.unflatten(structure, [jax.device_put(x, device) for x in found[0]]), found[1]


def _parts(method: Method) -> tuple[Callable, Callable, Callable]:
    """The three functions of a method whose models are scored elsewhere."""
    if method.start is None or method.propose is None or method.accept is None:
        raise UserError("this method has no `start`, `propose` and `accept`: see methods.Method")
    return method.start, method.propose, method.accept


def _scored(score: Score, models: PyTree, points: int) -> np.ndarray:
    """float32 [batch, points]."""
    on_host = jax.device_get(models)
    batch = jax.tree.leaves(on_host)[0].shape[0]
    return np.stack(
        [
            checked(score(jax.tree.map(lambda x, j=j: np.asarray(x[j]), on_host)), points)
            for j in range(batch)
        ]
    )


def beside(results: Sequence[Result]) -> Result:
    """Results of one method for several seeds as one.

    Args:
      results: each of one seed.
    """
    curve = {
        key: values if key == "evaluations" else np.concatenate([r.curve[key] for r in results], 1)
        for key, values in results[0].curve.items()
    }
    return Result(
        jax.tree.map(lambda *x: np.concatenate(x), *(r.best for r in results)),
        results[0].evaluations,
        curve,
        sum(r.seconds for r in results),
        sum(r.timed for r in results),
    )
