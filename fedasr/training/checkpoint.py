"""Checkpoints that survive `kill -9`, restored bit for bit: a thin layer over orbax-checkpoint.

A checkpoint is a folder `checkpoints/STEP/` that holds a pytree (`state`), a JSON object
(`metadata`) and the SHA-256 of every array and of the metadata (`checksums`; releases before
2026-12 wrote none). Orbax writes it under a temporary name and renames the folder as the last act,
so a folder named by a plain number is complete, whenever the process is killed. That it was written
is not taken for granted: each is read back and compared, and only then older ones may go.
"""

import contextlib
import functools
import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedasr.errors import REMEDIES, UserError, exhausted, pass_exhaustion
from fedasr.fields import check_local
from fedasr.training.locks import lock_directory as lock_directory  # beside what it guards
from fedasr.training.remote.copies import TEMPORARY_MARK
from fedasr.training.stored import (
    CHECKSUMS,
    METADATA,
    STATE,
    Unreadable,
    by_path,
    digests,
    fit,
    is_step,
    plain_path,
    read_json,
    reason_of,
    saved_steps,
    verify,
)
from fedasr.training.stored import has_checkpoint as has_checkpoint
from fedasr.training.stored import read_metadata as read_metadata
from fedasr.training.stored import restore_params as restore_params
from fedasr.training.stored import step_folders as step_folders

PyTree = Any

# What a checkpoint that cannot be read is renamed to, before its number.
DAMAGED = "damaged-"
# The library numbers the saves of a process: two at once wait for each other's numbers in vain.
_ONE_AT_A_TIME = threading.Lock()


class Checkpointer:
    """Saves and restores the states of one run.

    Saving copies the state to host memory; a thread writes that and reads it back. The copy is all
    that training waits for, unless the save before is still in flight: there is at most one.
    Opening a directory removes what an interrupted save left behind and sets aside (renames) what
    cannot be read, so only the process that trains may open it; others read with `restore_params`
    and `read_metadata`.

    Args:
        directory: folder of the checkpoints, created if missing; any path that the file system
            takes.
        keep: how many of the latest checkpoints to keep, at least 1. An older one is deleted only
            after a newer one was read back.

    Attributes:
        damaged: {folder as it is called now: why it cannot be read} of what was set aside.
        seconds: the longest that a save took until it was on the disk, as yet not read back; 0.0
            before the first.
        sent: called after each that was read back, before the next may begin: a place elsewhere
            gets it then. What it raises is what went wrong with that save. None for nothing.

    Raises:
        UserError: if `keep` is below 1, the folder cannot be made, or there are checkpoints and
            none of them can be read.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise UserError(f"at least one checkpoint must be kept, not keep={keep}")
        check_local("directory", directory)
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
            if TEMPORARY_MARK in folder.name and folder.is_dir():
                shutil.rmtree(folder)
        _quieten()
        self.damaged = _set_aside(self.directory)
        self._keep, self.seconds = keep, 0.0
        self.sent: Callable[[], None] | None = None
        self._writing: threading.Thread | None = None
        self._problem: Exception | None = None
        self._stack = contextlib.ExitStack()
        path = self._stack.enter_context(plain_path(self.directory))
        try:
            self._manager = _manager(path)
        except Exception as error:  # what orbax itself notes of a checkpoint is damaged
            pass_exhaustion(error, f"opening {self.directory}")
            self.damaged |= _set_aside(self.directory, _unopened)
            self._manager = _manager(path)

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
        metadata = json.loads(json.dumps(dict(metadata)))
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step < latest:
                raise ValueError(f"checkpoint {step} cannot follow checkpoint {latest}")
            return
        # numpy leaves are about twice as quick to write as jax arrays (which carry their
        # shardings), and a copy is needed anyway: the next round may donate these buffers.
        host_state = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        self._writing = threading.Thread(
            target=self._write, args=(int(step), host_state, metadata), daemon=True
        )
        self._writing.start()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight, for which the next one would wait."""
        return self._writing is not None and self._writing.is_alive()

    def _write(self, step: int, host_state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Writes a checkpoint, reads it back and deletes what it makes superfluous."""
        import orbax.checkpoint as ocp

        began = time.monotonic()
        try:
            if not self.directory.is_dir():  # or it would be made again, with nothing else in it
                raise FileNotFoundError("the folder was moved or removed")
            with _ONE_AT_A_TIME:
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        **{
                            STATE: ocp.args.PyTreeSave(host_state),
                            METADATA: ocp.args.JsonSave(metadata),
                            CHECKSUMS: ocp.args.JsonSave(_checksums(host_state, metadata)),
                        }
                    ),
                )
                self._manager.wait_until_finished()
            self.seconds = max(self.seconds, time.monotonic() - began)
            folder = self.directory / str(step)
            if not is_step(folder):
                raise OSError("it is not there")
            verify(folder)
            oldest = sorted(saved_steps(self.directory))[-self._keep :][0]
            for other in self.directory.iterdir():  # half-deleted ones are no steps any more
                if other.name.isdecimal() and int(other.name) < oldest:
                    shutil.rmtree(other)
        except Exception as error:
            self._problem = self._unwritten(step, error)
            return
        if self.sent is None:
            return
        try:
            self.sent()
            self.seconds = max(self.seconds, time.monotonic() - began)
        except Exception as error:  # of any kind: it is told where training waits for it
            self._problem = error

    def _unwritten(self, step: int, error: Exception) -> UserError:
        # The writes beside the one that failed have failed, too, and asyncio would print a
        # traceback of each that nobody asked for: it is one fault, said in one line.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        for folder in self.directory.glob(f"{step}{TEMPORARY_MARK}*"):
            shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room
        older = max((x for x in saved_steps(self.directory) if x != step), default=None)
        remedy = REMEDIES.get(exhausted(error), "make room there")
        if not self.directory.is_dir():
            remedy = "it was moved or removed while the run went on: put it back"
        return UserError(
            f"the checkpoint {step} cannot be written to {self.directory} ({reason_of(error)}): "
            f"{remedy}; the same command goes on "
            + ("from the beginning" if older is None else f"from checkpoint {older}")
        )

    def wait(self) -> None:
        """Blocks until the save in flight, if any, was read back.

        Raises:
            UserError: it was not written, or cannot be read.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None; waits for a save in flight."""
        self.wait()
        return max(saved_steps(self.directory), default=None)

    def oldest_step(self) -> int | None:
        """The oldest complete checkpoint that is still there, or None."""
        return min(saved_steps(self.directory), default=None)

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
        if self._writing is not None:
            self._writing.join()
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

    busy, seconds = False, 0.0

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Does nothing: see `Checkpointer.save`."""

    def wait(self) -> None:
        """Does nothing."""

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None."""
        return max(saved_steps(self.directory), default=None)

    def oldest_step(self) -> int | None:
        """The oldest complete checkpoint, or None."""
        return min(saved_steps(self.directory), default=None)

    def restore(
        self, step: int, like: PyTree, added: Collection[str] = ()
    ) -> tuple[PyTree, dict[str, Any]]:
        """See `Checkpointer.restore`."""
        folder = self.directory / str(step)
        if not is_step(folder):
            raise UserError(f"there is no checkpoint {step} in {self.directory}")
        return fit(folder, like, added), read_json(folder)

    def close(self) -> None:
        """Does nothing."""

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@functools.cache
def _quieten() -> None:
    """Keeps the libraries' tracebacks off stderr: what fails is raised, and told in one line.

    Orbax logs what its threads raise, and TensorStore reports to event loops that are closed.
    """
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _checksums(state: PyTree, metadata: Mapping[str, Any]) -> dict[str, str]:
    return digests(by_path(state), metadata)


def _manager(path: Path) -> Any:
    """Orbax's, of a folder of checkpoints whose path is plain."""
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        path,
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
            STATE: ocp.PyTreeCheckpointHandler(),
            METADATA: ocp.JsonCheckpointHandler(),
            CHECKSUMS: ocp.JsonCheckpointHandler(),
        },
    )


def _unopened(directory: Path) -> dict[Path, str]:
    """The checkpoints that orbax does not take, by themselves, and why."""
    found = {}
    for folder in step_folders(directory):
        with tempfile.TemporaryDirectory() as place, plain_path(place) as plain:
            (Path(place) / folder.name).symlink_to(folder, target_is_directory=True)
            try:
                _manager(plain).close()
            except Exception as error:
                pass_exhaustion(error, f"opening {folder}")
                found[folder] = f"the checkpoint {folder} cannot be read ({reason_of(error)})"
    return found


def _set_aside(
    directory: Path, unusable: Callable[[Path], dict[Path, str]] = lambda directory: {}
) -> dict[Path, str]:
    """Renames the latest checkpoints as long as they cannot be read, and others that are no use.

    Training is deterministic: from an older one it comes to the same.
    """
    damaged = unusable(directory)
    for step in sorted(saved_steps(directory), reverse=True):
        folder = directory / str(step)
        if folder in damaged:
            continue
        try:
            verify(folder)
        except Unreadable as error:
            damaged[folder] = str(error)
            continue
        break
    else:
        if damaged:
            folder, why = next(iter(damaged.items()))
            raise Unreadable(
                f"none of the {len(damaged)} checkpoints in {directory} can be read: put them back "
                f"from a copy, or remove that folder to start afresh ({folder.name}: {why[:200]})"
            )
    whole = max(
        (x for x in saved_steps(directory) if directory / str(x) not in damaged), default=-1
    )
    for folder in directory.iterdir():
        # Half of a folder that is older is on its way out; one that is newer has lost something.
        if folder.name.isdecimal() and not is_step(folder) and int(folder.name) > whole:
            damaged[folder] = f"the checkpoint {folder} lacks a part"
    renamed = {}
    for folder, why in damaged.items():
        place = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(place, ignore_errors=True)
        renamed[folder.rename(place)] = why
    return renamed
