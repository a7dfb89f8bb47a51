"""Runs a method for many seeds at once, measures it on the way, and resumes after a kill.

Randomness: fold_in(fold_in(key(seed), stream), step), so that a seed draws the same numbers however
often it is measured, wherever it was interrupted, whatever seeds are beside it. On the same devices
with the same seeds a resumed run is bit-identical; other neighbours may change the rounding.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedasr.errors import UserError
from fedasr.fusion import competition
from fedasr.fusion.methods import Method
from fedasr.training.checkpoint import Checkpointer, lock_directory

PyTree = Any
AXIS = "seeds"
_PARENTS, _INIT, _STEPS = range(3)  # streams of a seed's key


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
      best: the best model of every seed, by its mean score: leaves [seeds, ...], on the host.
      evaluations: of each seed, those of the parents not counted.
      curve: {name: float64 [measurements, seeds]}, with "evaluations" float64 [measurements]: what
        `measure` gave for the best model, and "score" (its mean score), "coverage" and "entropy"
        (see `competition`) of the models that the method holds.
      seconds: that this process searched, without compiling. timed: evaluations of all seeds in
        that time.
    """

    best: PyTree
    evaluations: int
    curve: Mapping[str, np.ndarray]
    seconds: float
    timed: int


def run(
    method: Method,
    make_parents: Callable[[jax.Array], PyTree],
    seeds: Sequence[int],
    evaluations: int,
    *,
    every: int = 1000,
    measure: Callable[[PyTree], Mapping[str, jax.Array]] = lambda params: {},
    workdir: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_seconds: float = 60.0,
    devices: Sequence[jax.Device] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Result:
    """Searches until every seed has had its evaluations.

    Seeds lie side by side on the devices; those of one device are vmapped, on a CPU one after the
    other. Nothing leaves the devices but what is measured.

    Args:
      method: what to run.
      make_parents: from a seed's key to models side by side, leaves [parents, ...]; compiled.
      seeds: each runs on its own.
      evaluations: of each seed, rounded up to whole steps of the method.
      every: evaluations between measurements.
      measure: from the best model to float scalars; compiled.
      workdir: for checkpoints; a run that finds one there goes on with it.
      identity: what a checkpoint must have been written with, JSON-serialisable.
      save_seconds: between checkpoints; the last measurement is always saved.
      devices: default all local ones.
      log: takes a line for every measurement.

    Raises:
      UserError: no seeds, a checkpoint of another run or of a longer one, or a work directory that
        another process works in.
    """
    if not seeds or evaluations < 1 or every < 1:
        raise UserError("seeds, evaluations and every must be at least one")
    devices = list(devices or jax.local_devices())[: len(seeds)]
    mesh = Mesh(np.asarray(devices), (AXIS,))
    padded = [*seeds, *[seeds[-1]] * (-len(seeds) % len(devices))]
    roots = jnp.stack([jax.random.key(seed) for seed in padded])
    roots = jax.device_put(roots, NamedSharding(mesh, PartitionSpec(AXIS)))
    start, advance = _compiled(method, make_parents, measure, mesh)
    total, every = (-(-n // method.batch) for n in (evaluations, every))
    identity = dict(identity or {}) | {"seeds": list(map(int, seeds))}

    state, measured = start(roots)
    done, curve = 0, [_record(0, measured, len(seeds))]
    with _Saved(workdir, identity) as saved:
        if found := saved.restore(jax.tree.map(lambda x: x[: len(seeds)], state)):
            # The seeds that only fill devices go on from a copy of the last one.
            pad = len(padded) - len(seeds)
            state = jax.tree.map(
                lambda new, old: jax.device_put(
                    np.concatenate([new, *[new[-1:]] * pad]), old.sharding
                ),
                found[0],
                state,
            )
            done, curve = found[1]
            if done > total:
                raise UserError(
                    f"{workdir} holds {done * method.batch} evaluations already, more than the "
                    f"{evaluations} asked for: choose another work directory"
                )
            log(f"going on from {done * method.batch} evaluations")
        advance = advance.lower(state, roots, jnp.int32(done), jnp.int32(done)).compile()
        seconds, timed, last_save = 0.0, 0, time.monotonic()
        while done < total:
            until = min(total, (done // every + 1) * every)
            began = time.perf_counter()
            state, measured = advance(state, roots, jnp.int32(done), jnp.int32(until))
            record = _record(until * method.batch, measured, len(seeds))  # waits
            seconds += time.perf_counter() - began
            timed += (until - done) * method.batch * len(seeds)
            done = until
            curve.append(record)
            log(_line(record))
            if done == total or time.monotonic() - last_save > save_seconds:
                saved.save(done, jax.tree.map(lambda x: x[: len(seeds)], state), curve)
                last_save = time.monotonic()
        best = jax.device_get(jax.jit(jax.vmap(method.best))(state))
    return Result(
        jax.tree.map(lambda x: x[: len(seeds)], best),
        total * method.batch,
        {key: np.array([record[key] for record in curve]) for key in curve[0]},
        seconds,
        timed,
    )


def _compiled(method: Method, make_parents: Any, measure: Any, mesh: Mesh) -> tuple[Any, Any]:
    """start(keys) and advance(states, keys, first step, end), both -> (states, measured)."""

    def observe(state):
        best = method.best(state)
        scores, filled = method.scores(state)
        return dict(measure(best)) | {
            "score": scores.mean(1).max(),
            "coverage": competition.coverage(scores),
            "entropy": competition.entropy(scores, filled),
        }

    def start_one(key):
        parents = make_parents(jax.random.fold_in(key, _PARENTS))
        state = method.init(parents, jax.random.fold_in(key, _INIT))
        return state, observe(state)

    def advance_one(state, key, first, end):
        steps = jax.random.fold_in(key, _STEPS)

        def body(i, s):
            return method.step(s, jax.random.fold_in(steps, i), i)

        state = jax.lax.fori_loop(first, end, body, state)
        return state, observe(state)

    def side_by_side(f, states):
        # Vmapped matrix products of a CPU are slower than one after the other.
        if mesh.devices.flat[0].platform == "cpu":
            return jax.lax.map(f, states)
        return jax.vmap(f)(states)

    seeds, whole = PartitionSpec(AXIS), PartitionSpec()
    wrap = functools.partial(jax.shard_map, mesh=mesh, out_specs=seeds, check_vma=False)
    start = jax.jit(wrap(lambda keys: side_by_side(start_one, keys), in_specs=seeds))

    def advance(states, keys, first, end):
        return side_by_side(lambda x: advance_one(*x, first, end), (states, keys))

    advance = wrap(advance, in_specs=(seeds, seeds, whole, whole))
    return start, jax.jit(advance, donate_argnums=0)


def _record(evaluations: int, measured: Mapping[str, jax.Array], seeds: int) -> dict[str, Any]:
    values = {key: np.asarray(value, np.float64) for key, value in measured.items()}
    return {"evaluations": evaluations} | {k: v[:seeds].tolist() for k, v in values.items()}


def _line(record: Mapping[str, Any]) -> str:
    means = (f"{key} {np.mean(v):.4f}" for key, v in record.items() if key != "evaluations")
    return f"{record['evaluations']} evaluations: {', '.join(means)}"


class _Saved:
    """The checkpoints of a run, or none without a work directory."""

    def __init__(self, workdir: str | Path | None, identity: Mapping[str, Any]) -> None:
        self._checkpointer = self._lock = None
        self._identity = dict(identity)
        if workdir:
            try:
                Path(workdir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make --workdir={workdir}: {error.strerror}") from error
            self._lock = lock_directory(workdir)
            self._checkpointer = Checkpointer(Path(workdir) / "checkpoints")

    def __enter__(self) -> "_Saved":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._checkpointer:
            self._checkpointer.close()
            if self._lock:
                self._lock.close()

    def restore(self, like: PyTree) -> tuple[PyTree, tuple[int, list]] | None:
        if not self._checkpointer or (step := self._checkpointer.latest_step()) is None:
            return None
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        state, metadata = self._checkpointer.restore(step, shapes)
        if metadata["identity"] != self._identity:
            raise UserError(
                f"{self._checkpointer.directory.parent} holds another run "
                f"({metadata['identity']}): choose another work directory"
            )
        return state, (step, metadata["curve"])

    def save(self, step: int, state: PyTree, curve: list) -> None:
        if self._checkpointer:
            metadata = {"identity": self._identity, "curve": curve}
            self._checkpointer.save(step, jax.device_get(state), metadata)
