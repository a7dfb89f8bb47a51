"""Checkpoints that survive `kill -9`, restored bit for bit: a thin layer over orbax-checkpoint.

A checkpoint is a folder `checkpoints/STEP/` that holds a pytree (`state`) and a JSON object
(`metadata`). Orbax writes it under a temporary name and renames the folder as the last act, so a
folder named by a plain number is complete, whenever the process is killed.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError

PyTree = Any

_STATE, _METADATA = "state", "metadata"
# Written by orbax inside every complete step folder.
_STEP_MARKER = "_CHECKPOINT_METADATA"
# Part of the name of a folder that orbax has not finished.
_TEMPORARY_MARK = ".orbax-checkpoint-tmp"


class Checkpointer:
    """Saves and restores the states of one run.

    Saving copies the state to host memory and writes it in the background: the copy is all that
    training waits for. At most one save is in flight. Opening a directory removes what an
    interrupted save left behind, so only the process that trains may open it; others read with
    `restore_params` and `read_metadata`.

    Args:
        directory: folder of the checkpoints, created if missing.
        keep: how many of the latest checkpoints to keep, at least 1. An older one is deleted only
            after a newer one is complete.

    Raises:
        UserError: if `keep` is below 1 or the folder cannot be made.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise UserError(f"at least one checkpoint must be kept, not keep={keep}")
        self.directory = Path(directory).absolute()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the checkpoint folder {self.directory} ({error.strerror}): "
                "choose another work directory"
            ) from error
        # Orbax's own clean-up runs in the background and may not end in a run that saves nothing.
        for folder in self.directory.iterdir():
            if _TEMPORARY_MARK in folder.name and folder.is_dir():
                shutil.rmtree(folder)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                create=False,
                # Of several processes one writes: it must not wait for the others.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=jax.process_index(),
                    active_processes={jax.process_index()} if jax.process_count() > 1 else None,
                ),
            ),
            item_handlers={
                _STATE: ocp.PyTreeCheckpointHandler(),
                _METADATA: ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Starts saving `state` as checkpoint `step`; `wait` returns when it is complete.

        A step that is already saved is left as it is: training is deterministic, so a step has one
        state. An error of the previous save that was still in flight is raised here.

        Args:
            step: number of the checkpoint, larger than any saved before.
            state: pytree of arrays and numbers; it may be donated or changed after the call.
            metadata: JSON-serialisable mapping, read back without knowing the model.

        Raises:
            ValueError: if `step` is below the latest one saved.
            TypeError: if `metadata` is not JSON-serialisable.
        """
        import orbax.checkpoint as ocp

        metadata = json.loads(json.dumps(dict(metadata)))
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step < latest:
                raise ValueError(f"checkpoint {step} cannot follow checkpoint {latest}")
            return
        # numpy leaves are about twice as quick to write as jax arrays (which carry their
        # shardings), and a copy is needed anyway: the next round may donate these buffers.
        host_state = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        self._manager.save(
            int(step),
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.PyTreeSave(host_state),
                    _METADATA: ocp.args.JsonSave(metadata),
                }
            ),
        )

    def wait(self) -> None:
        """Blocks until the save in flight, if any, is complete; raises its error."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None; waits for a save in flight."""
        self.wait()
        return self._manager.latest_step()

    def oldest_step(self) -> int | None:
        """The oldest complete checkpoint that is still there, or None."""
        return min(_steps(self.directory), default=None)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Returns `(state, metadata)` of checkpoint `step`, bit for bit as saved.

        Args:
            step: number of a complete checkpoint.
            like: pytree with the structure, shapes and dtypes that the state must have (arrays,
                numbers or `jax.ShapeDtypeStruct`). It also decides the kind of each leaf: numpy
                leaves and Python numbers come back as such, everything else as jax arrays, on the
                sharding that the leaf of `like` is committed to, if any.

        Raises:
            UserError: if there is no such checkpoint, it cannot be read, or it does not fit `like`
                (the message names the first leaf that differs).
        """
        self.wait()
        return CheckpointReader(self.directory).restore(step, like)

    def close(self) -> None:
        """Waits for the save in flight and frees the resources."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class CheckpointReader:
    """Reads the checkpoints that another process of the same run writes; saves nothing.

    Args:
        directory: folder of the checkpoints; it may be missing.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Does nothing: see `Checkpointer.save`."""

    def wait(self) -> None:
        """Does nothing."""

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None."""
        return max(_steps(self.directory), default=None)

    def oldest_step(self) -> int | None:
        """The oldest complete checkpoint, or None."""
        return min(_steps(self.directory), default=None)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """See `Checkpointer.restore`."""
        folder = self.directory / str(step)
        if not _is_step(folder):
            raise UserError(f"there is no checkpoint {step} in {self.directory}")
        return _fit(folder, like), _read_json(folder)

    def close(self) -> None:
        """Does nothing."""

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def restore_params(path: str | Path) -> PyTree:
    """The model parameters of a checkpoint, without knowing the model.

    Args:
        path: a work directory, its `checkpoints/` folder (both stand for the latest checkpoint in
            them) or the folder of one checkpoint.

    Returns:
        The saved state's `params` as nested dicts (sequences as lists) of numpy arrays.

    Raises:
        UserError: if there is no complete checkpoint at `path`, or none with parameters.
    """
    folder = _find_step(path)
    tree = _read_shapes(folder)
    if not isinstance(tree, Mapping) or not jax.tree.leaves(tree.get("params")):
        raise UserError(
            f"the checkpoint {folder} holds no model parameters: give the work directory of a "
            "training run"
        )
    return _read_arrays(folder, {"params": tree["params"]})["params"]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata saved with a checkpoint; `path` and errors as in `restore_params`."""
    return _read_json(_find_step(path))


def lock_directory(workdir: str | Path) -> IO[str]:
    """Keeps other processes out of a work directory; the system frees it when this one ends.

    Args:
        workdir: a folder.

    Returns:
        A file; closing it frees the directory.

    Raises:
        UserError: if another process, or another lock of this one, holds it.
    """
    file = (Path(workdir) / ".lock").open("w")
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise UserError(f"--workdir={workdir} is in use by another process") from error
    return file


def _is_step(folder: Path) -> bool:
    return (folder / _STEP_MARKER).is_file() and (folder / _STATE).is_dir()


def _steps(directory: Path) -> list[int]:
    """Numbers of the complete checkpoints in a folder, which may be missing."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return [int(f.name) for f in folders if f.name.isdecimal() and _is_step(f)]


def _find_step(path: str | Path) -> Path:
    path = Path(path).absolute()
    if _is_step(path):
        return path
    for parent in (path / "checkpoints", path):
        if steps := _steps(parent):
            return parent / str(max(steps))
    raise UserError(
        f"no checkpoint in {path}: give a work directory, its checkpoints folder or the folder of "
        "one checkpoint"
    )


def _unreadable(folder: Path, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), "")[:200]
    return UserError(
        f"the checkpoint {folder} cannot be read ({type(error).__name__}: {reason}): remove that "
        "folder to use an earlier checkpoint"
    )


def _read_json(folder: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    try:
        return ocp.JsonCheckpointHandler().restore(folder / _METADATA)
    except Exception as error:
        raise _unreadable(folder, error) from error


def _read_shapes(folder: Path) -> PyTree:
    """Nested dicts and lists of objects with `shape` and `dtype`; no array is read."""
    import orbax.checkpoint as ocp

    try:
        return ocp.PyTreeCheckpointHandler().metadata(folder / _STATE).tree
    except Exception as error:
        raise _unreadable(folder, error) from error


def _read_arrays(folder: Path, tree: PyTree) -> PyTree:
    """The numpy arrays of `tree`, which is `_read_shapes` of the folder or a part of it."""
    import orbax.checkpoint as ocp

    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    try:
        return ocp.PyTreeCheckpointHandler().restore(
            folder / _STATE,
            args=ocp.args.PyTreeRestore(
                item=tree,
                restore_args=jax.tree.map(lambda _: as_numpy, tree),
                partial_restore=True,
            ),
        )
    except Exception as error:
        raise _unreadable(folder, error) from error


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path; the same for a NamedTuple or tuple as for the dict or list orbax reads."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def _fit(folder: Path, like: PyTree) -> PyTree:
    tree = _read_shapes(folder)
    saved, wanted = _by_path(tree), _by_path(like)

    def misfit(difference: str) -> UserError:
        return UserError(
            f"the checkpoint {folder} does not fit this model: {difference}; use the configuration "
            "it was saved with or another work directory"
        )

    for name, leaf in wanted.items():
        if name not in saved:
            raise misfit(f"it has no {name}")
        for what, here, there in zip(
            ("shape", "dtype"), _shape_dtype(leaf), _shape_dtype(saved[name]), strict=True
        ):
            if here != there:
                raise misfit(f"the {what} of {name} is {there} in it, {here} in the model")
    for name in saved:
        if name not in wanted:
            raise misfit(f"the model has no {name}")

    arrays = _by_path(_read_arrays(folder, tree))
    leaves = [_as_kind(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _as_kind(value: np.ndarray, like: Any) -> Any:
    if isinstance(like, bool | int | float):
        return type(like)(value)
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    # 64-bit values do not fit a jax array unless x64 is enabled.
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        return value
    sharding = like.sharding if getattr(like, "committed", True) else None
    # A copy: on a CPU jax may otherwise share, and then donate, memory that numpy owns.
    return jnp.array(value) if sharding is None else jax.device_put(value.copy(), sharding)
