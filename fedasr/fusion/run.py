"""Runs a method for many seeds at once, measures it on the way, and resumes after a kill.

Randomness: fold_in(fold_in(key(seed), stream), step), so that a seed draws the same numbers however
often it is measured, wherever it was interrupted, whatever seeds are beside it. On the same devices
with the same seeds a resumed run is bit-identical; other neighbours may change the rounding.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedasr.errors import UserError
from fedasr.fusion import archive as archives
from fedasr.fusion import competition
from fedasr.fusion.methods import Method
from fedasr.training.checkpoint import Checkpointer, lock_directory

PyTree = Any
AXIS = "seeds"
PARENTS, INIT, STEPS = range(3)  # streams of a seed's key


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
      UserError: no seeds, a checkpoint of another run or of a longer one, a work directory that
        another process works in, scores below 0, or a score that JAX cannot compile.
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

    with _compilable():
        state, measured = start(roots)
    done, curve = 0, [record_of(0, measured, len(seeds))]
    with Saved(workdir, identity) as saved:
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
            record = record_of(until * method.batch, measured, len(seeds))  # waits
            seconds += time.perf_counter() - began
            timed += (until - done) * method.batch * len(seeds)
            done = until
            curve.append(record)
            log(line_of(record))
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
        return dict(measure(method.best(state))) | observed(method, state)

    def start_one(key):
        parents = make_parents(jax.random.fold_in(key, PARENTS))
        state = method.init(parents, jax.random.fold_in(key, INIT))
        return state, observe(state)

    def advance_one(state, key, first, end):
        steps = jax.random.fold_in(key, STEPS)

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


def observed(method: Method, state: Any) -> dict[str, jax.Array]:
    """What is measured of every search, float32 each; "lowest" is for `archive.refuse_negative`.

    Args:
      method: that searches. state: its.
    """
    scores, filled = method.scores(state)
    return {
        "score": scores.mean(1).max(),
        "coverage": competition.coverage(scores),
        "entropy": competition.entropy(scores, filled),
        "lowest": jnp.asarray(method.lowest(state), jnp.float32),
    }


@contextlib.contextmanager
def _compilable() -> Iterator[None]:
    """What other frameworks say of JAX's tracers, in words that help."""
    try:
        yield
    except Exception as error:
        if isinstance(error, jax.errors.JAXTypeError) or "Tracer" in str(error):
            why = str(error).split("\n", 1)[0]
            raise UserError(
                "JAX cannot compile the score (or make_parents, or measure): write it with "
                "jax.numpy, or search with `fedasr.fusion.outside`, which takes scores of any "
                f"framework ({why})"
            ) from error
        raise


def record_of(
    evaluations: int, measured: Mapping[str, jax.Array], seeds: int = 1
) -> dict[str, Any]:
    """A measurement as JSON: {"evaluations": int, name: [a float for each seed]}.

    Args:
      evaluations: so far. measured: [seeds or more] or scalars, with `observed`. seeds: that count.

    Raises:
      UserError: if a model had a score below 0.
    """
    values = {key: np.asarray(x, np.float64).reshape(-1)[:seeds] for key, x in measured.items()}
    archives.refuse_negative(values.pop("lowest"))
    return {"evaluations": evaluations} | {key: x.tolist() for key, x in values.items()}


def line_of(record: Mapping[str, Any]) -> str:
    """A measurement in words, means over seeds."""
    means = (f"{key} {np.mean(v):.4f}" for key, v in record.items() if key != "evaluations")
    return f"{record['evaluations']} evaluations: {', '.join(means)}"


class Saved:
    """The checkpoints of a run, or none without a work directory.

    Args:
      workdir: of the run, or None. identity: what a checkpoint must have been written with.

    Raises:
      UserError: the directory cannot be made, or another process works in it.
    """

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

    def __enter__(self) -> "Saved":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._checkpointer:
            self._checkpointer.close()
            if self._lock:
                self._lock.close()

    def restore(self, like: PyTree) -> tuple[PyTree, tuple[int, list]] | None:
        """(state, (steps, curve)) of the latest checkpoint, or None.

        Raises:
          UserError: it is of another run.
        """
        if not self._checkpointer or (step := self._checkpointer.latest_step()) is None:
            return None
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        state, metadata = self._checkpointer.restore(step, shapes, added=("lowest",))
        if metadata["identity"] != self._identity:
            raise UserError(
                f"{self._checkpointer.directory.parent} holds another run "
                f"({metadata['identity']}): choose another work directory"
            )
        return state, (step, metadata["curve"])

    def save(self, step: int, state: PyTree, curve: list) -> None:
        """Starts to write a checkpoint."""
        if self._checkpointer:
            metadata = {"identity": self._identity, "curve": curve}
            self._checkpointer.save(step, jax.device_get(state), metadata)
