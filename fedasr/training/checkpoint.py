"""Checkpoints that survive `kill -9`, restored bit for bit: a thin layer over orbax-checkpoint.

A checkpoint is a folder `checkpoints/STEP/` that holds a pytree (`state`), a JSON object
(`metadata`) and the SHA-256 of every array and of the metadata (`checksums`; releases before
2026-12 wrote none). Orbax writes it under a temporary name and renames the folder as the last act,
so a folder named by a plain number is complete, whenever the process is killed. That it was written
is not taken for granted: each is read back and compared, and only then older ones may go.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError
from fedasr.training.locks import lock_directory as lock_directory  # beside what it guards

PyTree = Any

_STATE, _METADATA, _CHECKSUMS = "state", "metadata", "checksums"
# Written by orbax inside every complete step folder.
_STEP_MARKER = "_CHECKPOINT_METADATA"
# Part of the name of a folder that orbax has not finished.
_TEMPORARY_MARK = ".orbax-checkpoint-tmp"
# What a checkpoint that cannot be read is renamed to, before its number.
DAMAGED = "damaged-"
# Paths that mean themselves to every library: others may be taken for patterns or escapes.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_/.+=,-]*")


class Checkpointer:
    """Saves and restores the states of one run.

    Saving copies the state to host memory, writes it in the background and reads it back: the copy
    is all that training waits for. At most one save is in flight. Opening a directory removes what
    an interrupted save left behind and sets aside (renames) what cannot be read, so only the
    process that trains may open it; others read with `restore_params` and `read_metadata`.

    Args:
        directory: folder of the checkpoints, created if missing; any path that the file system
            takes.
        keep: how many of the latest checkpoints to keep, at least 1. An older one is deleted only
            after a newer one was read back.

    Attributes:
        damaged: {folder as it is called now: why it cannot be read} of what was set aside.

    Raises:
        UserError: if `keep` is below 1, the folder cannot be made, or there are checkpoints and
            none of them can be read.
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
        self.damaged = _set_aside(self.directory)
        self._keep = keep
        self._reading: threading.Thread | None = None
        self._problem: Exception | None = None
        self._stack = contextlib.ExitStack()
        self._manager = ocp.CheckpointManager(
            self._stack.enter_context(plain_path(self.directory)),
            options=ocp.CheckpointManagerOptions(
                # Keeps all: what is old is deleted here, after the newest was read back.
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
                _CHECKSUMS: ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Starts saving `state` as checkpoint `step`; `wait` returns when it is complete.

        A step that is already saved is left as it is: training is deterministic, so a step has one
        state. What went wrong with the previous save, if it was still in flight, is raised here.

        Args:
            step: number of the checkpoint, larger than any saved before.
            state: pytree of arrays and numbers; it may be donated or changed after the call.
            metadata: JSON-serialisable mapping, read back without knowing the model.

        Raises:
            ValueError: if `step` is below the latest one saved.
            TypeError: if `metadata` is not JSON-serialisable.
            UserError: the checkpoint cannot be written, such as on a full disk; all older ones are
                as they were.
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
        try:
            self._manager.save(
                int(step),
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.PyTreeSave(host_state),
                        _METADATA: ocp.args.JsonSave(metadata),
                        _CHECKSUMS: ocp.args.JsonSave(_checksums(host_state, metadata)),
                    }
                ),
            )
        except Exception as error:
            raise self._unwritten(step, error) from error
        self._reading = threading.Thread(target=self._read_back, args=(int(step),), daemon=True)
        self._reading.start()

    def _read_back(self, step: int) -> None:
        """Waits for a save, reads it and deletes what it makes superfluous."""
        try:
            self._manager.wait_until_finished()
            folder = self.directory / str(step)
            if not _is_step(folder):
                raise OSError("it is not there")
            verify(folder)
            oldest = sorted(_steps(self.directory))[-self._keep :][0]
            for other in self.directory.iterdir():  # half-deleted ones are no steps any more
                if other.name.isdecimal() and int(other.name) < oldest:
                    shutil.rmtree(other)
        except Exception as error:
            self._problem = self._unwritten(step, error)

    def _unwritten(self, step: int, error: Exception) -> UserError:
        for folder in self.directory.glob(f"{step}{_TEMPORARY_MARK}*"):
            shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room
        older = max((x for x in _steps(self.directory) if x != step), default=None)
        return UserError(
            f"the checkpoint {step} cannot be written to {self.directory} ({_reason(error)}): make "
            "room there; the same command goes on "
            + ("from the beginning" if older is None else f"from checkpoint {older}")
        )

    def wait(self) -> None:
        """Blocks until the save in flight, if any, was read back.

        Raises:
            UserError: it was not written, or cannot be read.
        """
        if self._reading is not None:
            self._reading.join()
            self._reading = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None; waits for a save in flight."""
        self.wait()
        return max(_steps(self.directory), default=None)

    def oldest_step(self) -> int | None:
        """The oldest complete checkpoint that is still there, or None."""
        return min(_steps(self.directory), default=None)

    def restore(
        self, step: int, like: PyTree, added: Collection[str] = ()
    ) -> tuple[PyTree, dict[str, Any]]:
        """Returns `(state, metadata)` of checkpoint `step`, bit for bit as saved.

        Args:
            step: number of a complete checkpoint.
            like: pytree with the structure, shapes and dtypes that the state must have (arrays,
                numbers or `jax.ShapeDtypeStruct`). It also decides the kind of each leaf: numpy
                leaves and Python numbers come back as such, everything else as jax arrays, on the
                sharding that the leaf of `like` is committed to, if any.
            added: paths of leaves (or of what they lie in) that a release added: where the
                checkpoint lacks one, the value is that of `like`.

        Raises:
            UserError: if there is no such checkpoint, it cannot be read, or it does not fit `like`
                (the message names the first leaf that differs).
        """
        self.wait()
        return CheckpointReader(self.directory).restore(step, like, added)

    def close(self) -> None:
        """Waits for the save in flight and frees the resources."""
        if self._reading is not None:
            self._reading.join()
        with self._stack:
            # What went wrong with the last save was raised by `wait`, or something else was.
            with contextlib.suppress(Exception):
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

    def restore(
        self, step: int, like: PyTree, added: Collection[str] = ()
    ) -> tuple[PyTree, dict[str, Any]]:
        """See `Checkpointer.restore`."""
        folder = self.directory / str(step)
        if not _is_step(folder):
            raise UserError(f"there is no checkpoint {step} in {self.directory}")
        return _fit(folder, like, added), _read_json(folder)

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


def verify(folder: Path) -> None:
    """Reads one checkpoint and compares it with its checksums, if it has any.

    Raises:
        UserError: it cannot be read, or holds something else than was saved.
    """
    metadata = _read_json(folder)
    arrays = _by_path(_read_arrays(folder, _read_shapes(folder)))
    if (expected := _read_checksums(folder)) is None:
        return
    found = _digests(arrays, metadata)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise _unreadable(folder, OSError(f"{name} is not what was saved"))


def _checksums(state: PyTree, metadata: Mapping[str, Any]) -> dict[str, str]:
    return _digests(_by_path(state), metadata)


def _digests(arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by path of kind, shape and bytes, and of the metadata as "metadata"."""
    digests = {"metadata": hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())}
    for path, leaf in arrays.items():
        value = np.ascontiguousarray(leaf)
        head = f"{value.dtype} {np.shape(leaf)} ".encode()
        digests[f"state/{path}"] = digest = hashlib.sha256(head)
        digest.update(value.view(np.uint8) if value.size and value.ndim else value.tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _set_aside(directory: Path) -> dict[Path, str]:
    """Renames the latest checkpoints as long as they cannot be read.

    Training is deterministic: from an older one it comes to the same.
    """
    damaged: dict[Path, str] = {}
    for step in sorted(_steps(directory), reverse=True):
        folder = directory / str(step)
        try:
            verify(folder)
        except UserError as error:
            damaged[folder] = str(error)
            continue
        break
    else:
        if damaged:
            folder, error = next(iter(damaged.items()))
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {directory} can be read: put them back "
                f"from a copy, or remove that folder to start afresh ({folder.name}: {error[:200]})"
            )
    whole = max((x for x in _steps(directory) if directory / str(x) not in damaged), default=-1)
    for folder in directory.iterdir():
        # Half of a folder that is older is on its way out; one that is newer has lost something.
        if folder.name.isdecimal() and not _is_step(folder) and int(folder.name) > whole:
            damaged[folder] = f"the checkpoint {folder} lacks a part"
    renamed = {}
    for folder, why in damaged.items():
        place = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(place, ignore_errors=True)
        renamed[folder.rename(place)] = why
    return renamed


@contextlib.contextmanager
def plain_path(path: str | Path) -> Iterator[Path]:
    """The same folder by a path that no library takes for a pattern.

    Orbax looks for files by patterns made of its folder's path, so that brackets in it hide what it
    has written. Where a path is not plain, a symbolic link in a temporary folder leads there.

    Args:
        path: of a folder that exists.

    Raises:
        UserError: no folder for temporary files has a plain path.
    """
    path = Path(path).absolute()
    if _PLAIN_PATH.fullmatch(str(path)):
        yield path
        return
    places = [p for p in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")]
    for place in filter(_PLAIN_PATH.fullmatch, places):
        try:
            folder = tempfile.TemporaryDirectory(prefix="fedasr-", dir=place)
        except OSError:
            continue
        with folder as name:
            link = Path(name) / "link"
            link.symlink_to(path, target_is_directory=True)
            yield link
        return
    raise UserError(
        f"{path} has characters that a library takes for a pattern, and no folder for temporary "
        "files can hold a link to it: set TMPDIR to one with a plain path"
    )


def _is_step(folder: Path) -> bool:
    return (folder / _STEP_MARKER).is_file() and (folder / _STATE).is_dir()


def _steps(directory: Path) -> list[int]:
    """Numbers of the complete checkpoints in a folder, which may be missing."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return [int(f.name) for f in folders if f.name.isdecimal() and _is_step(f)]


def step_folders(directory: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, which may be missing, the oldest first."""
    return [Path(directory) / str(step) for step in sorted(_steps(Path(directory)))]


def has_checkpoint(path: str | Path) -> bool:
    """Whether there is a complete checkpoint at a path as `restore_params` takes it."""
    path = Path(path).absolute()
    return _is_step(path) or any(map(_steps, (path / "checkpoints", path)))


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


def _reason(error: Exception) -> str:
    reason = str(error)
    if "o space left" in reason:
        return os.strerror(28)
    reason = " ".join(reason.split())
    return f"{type(error).__name__}: {reason}"[:200]


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"the checkpoint {folder} cannot be read ({_reason(error)}): remove that "
        "folder to use an earlier checkpoint"
    )


def _read_checksums(folder: Path) -> dict[str, str] | None:
    """None of a checkpoint that was saved without."""
    import orbax.checkpoint as ocp

    if not (folder / _CHECKSUMS).exists():
        return None
    try:
        with plain_path(folder) as plain:
            return ocp.JsonCheckpointHandler().restore(plain / _CHECKSUMS)
    except Exception as error:
        raise _unreadable(folder, error) from error


def _read_json(folder: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    try:
        with plain_path(folder) as plain:
            metadata = ocp.JsonCheckpointHandler().restore(plain / _METADATA)
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no object")
        return metadata
    except Exception as error:
        raise _unreadable(folder, error) from error


def _read_shapes(folder: Path) -> PyTree:
    """Nested dicts and lists of objects with `shape` and `dtype`; no array is read."""
    import orbax.checkpoint as ocp

    try:
        with plain_path(folder) as plain:
            return ocp.PyTreeCheckpointHandler().metadata(plain / _STATE).tree
    except Exception as error:
        raise _unreadable(folder, error) from error


def _read_arrays(folder: Path, tree: PyTree) -> PyTree:
    """The numpy arrays of `tree`, which is `_read_shapes` of the folder or a part of it."""
    import orbax.checkpoint as ocp

    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    try:
        with plain_path(folder) as plain:
            return ocp.PyTreeCheckpointHandler().restore(
                plain / _STATE,
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


def _fit(folder: Path, like: PyTree, added: Collection[str] = ()) -> PyTree:
    tree = _read_shapes(folder)
    saved, wanted = _by_path(tree), _by_path(like)
    filled = {
        name
        for name in wanted.keys() - saved.keys()
        if any(name == path or name.startswith(f"{path}/") for path in added)
    }

    def misfit(difference: str) -> UserError:
        return UserError(
            f"the checkpoint {folder} does not fit this model: {difference}; use the configuration "
            "it was saved with or another work directory"
        )

    for name, leaf in wanted.items():
        if name in filled:
            continue
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
    leaves = [
        leaf if name in filled else _as_kind(arrays[name], leaf) for name, leaf in wanted.items()
    ]
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
