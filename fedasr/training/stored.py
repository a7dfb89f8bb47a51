"""Reading what checkpoints hold: parameters, metadata, and whether all is as it was saved.

See `fedasr.training.checkpoint` for what a checkpoint is.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError, pass_exhaustion
from fedasr.fields import bucket
from fedasr.training import exported
from fedasr.training.locks import lock_directory as lock_directory  # beside what it guards
from fedasr.training.remote.copies import STEP_MARKER, local
from fedasr.training.remote.storage import is_remote

PyTree = Any


class Unreadable(UserError):
    """A checkpoint is damaged; another one may be whole."""


# Of errors that say nothing about what lies on the disk.
_NO_DAMAGE = re.compile(
    "Permission denied|Operation not permitted|Stale file handle|endpoint is not connected"
    "|timed out|Host is down|No route to host"
)
BEST_FOLDER = "best"  # of a work directory whose run keeps the best state on a split
STATE, METADATA, CHECKSUMS = "state", "metadata", "checksums"
_NUMBER = re.compile("0|[1-9][0-9]*")  # as a checkpoint is called
# Paths that mean themselves to every library: others may be taken for patterns or escapes.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_/.+=,-]*")


def restore_params(path: str | Path) -> PyTree:
    """The model parameters of a checkpoint, without knowing the model.

    Args:
        path: a work directory, its `checkpoints/` folder (both stand for the latest checkpoint in
            them; a work directory for the best, if its run keeps that: see
            `fedasr.training.selection`), the folder of one checkpoint, or one of `fedasr export`.
            A URL in cloud storage is copied, and read from that copy until the next run, dry run or
            `fedasr.load` in this process, or `fedasr.training.remote.copies.refresh`.

    Returns:
        The saved state's `params` as nested dicts (sequences as lists) of numpy arrays.

    Raises:
        UserError: if there is no complete checkpoint at `path`, or none with parameters, or they
            are not what was saved.
    """
    if exported.is_exported(path):
        return exported.read_params(path)
    folder = find_step(path)
    tree = read_shapes(folder)
    if not isinstance(tree, Mapping) or not jax.tree.leaves(tree.get("params")):
        raise UserError(
            f"the checkpoint {folder} holds no model parameters: give the work directory of a "
            "training run"
        )
    params = read_arrays(folder, {"params": tree["params"]})
    if (expected := read_checksums(folder)) is not None:
        _compare(folder, expected, digests(by_path(params)))
    return params["params"]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata saved with a checkpoint; `path` and errors as in `restore_params`."""
    if exported.is_exported(path):
        return exported.read_metadata(path)
    return read_json(find_step(path))


def verify(folder: Path) -> None:
    """Reads one checkpoint and compares it with its checksums, if it has any.

    Raises:
        Unreadable: it cannot be read, or holds something else than was saved.
        UserError: it cannot be read now, and may be as good as ever.
    """
    metadata = read_json(folder)
    arrays = by_path(read_arrays(folder, read_shapes(folder)))
    if (expected := read_checksums(folder)) is None:
        return
    found = digests(arrays, metadata)
    _compare(folder, expected, dict.fromkeys(expected, "") | found)


def _compare(folder: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises Unreadable unless what was found is what was saved."""
    for name in sorted(found):
        if expected.get(name) != found[name]:
            raise unreadable(folder, OSError(f"{name} is not what was saved"))


def digests(arrays: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> dict[str, str]:
    """SHA-256 by path of kind, shape and bytes, and of the metadata, if given, as "metadata"."""
    digests = {}
    if metadata is not None:
        digests["metadata"] = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for path, leaf in arrays.items():
        value = np.ascontiguousarray(leaf)
        head = f"{value.dtype} {np.shape(leaf)} ".encode()
        digests[f"state/{path}"] = digest = hashlib.sha256(head)
        digest.update(value.view(np.uint8).data if value.size and value.ndim else value.tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


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
    places = ["/tmp", "/var/tmp", "/dev/shm"]
    with contextlib.suppress(OSError):  # no folder for temporary files has room
        places.insert(0, tempfile.gettempdir())
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


def is_step(folder: Path) -> bool:
    """Whether it is a complete checkpoint."""
    return (folder / STEP_MARKER).is_file() and (folder / STATE).is_dir()


def saved_steps(directory: Path) -> list[int]:
    """Numbers of the complete checkpoints in a folder, which may be missing."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return [int(f.name) for f in folders if _NUMBER.fullmatch(f.name) and is_step(f)]


def step_folders(directory: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, which may be missing, the oldest first."""
    return [Path(directory) / str(step) for step in sorted(saved_steps(Path(directory)))]


def has_checkpoint(path: str | Path) -> bool:
    """Whether there is a complete checkpoint at a path as `restore_params` takes it."""
    path = Path(path).absolute()
    return is_step(path) or any(map(saved_steps, (path / "checkpoints", path)))


def find_step(path: str | Path) -> Path:
    """The folder of a checkpoint, by a path as `restore_params` takes it."""
    given = path
    if not is_remote(path) and (wrong := bucket(str(path))):
        raise UserError(f"{path} {wrong}")
    path = local(path).absolute()
    if is_step(path):
        return path
    for parent in (path / BEST_FOLDER, path / "checkpoints", path):
        if found := saved_steps(parent):
            return parent / str(max(found))
    raise UserError(
        f"no checkpoint in {given if is_remote(given) else path}: give a work directory, its "
        "checkpoints folder or the folder of one checkpoint"
    )


def reason_of(error: Exception) -> str:
    """What went wrong, short and on one line."""
    reason = str(error)
    if "o space left" in reason:
        return os.strerror(28)
    reason = " ".join(reason.split())
    return f"{type(error).__name__}: {reason}"[:200]


def unreadable(folder: Path, error: Exception) -> UserError:
    """Says so, and how to go on.

    Raises:
      Exhausted, UserError: the checkpoint may be as good as ever.
    """
    pass_exhaustion(error, f"reading {folder}")
    if isinstance(error, UserError):
        raise error
    if found := _NO_DAMAGE.search(str(error)):
        raise UserError(
            f"the checkpoint {folder} cannot be read now ({found[0]}): mend that, and the same "
            "command goes on"
        ) from error
    return Unreadable(
        f"the checkpoint {folder} cannot be read ({reason_of(error)}): remove that "
        "folder to use an earlier checkpoint"
    )


def read_checksums(folder: Path) -> dict[str, str] | None:
    """None of a checkpoint that was saved without."""
    import orbax.checkpoint as ocp

    if not (folder / CHECKSUMS).exists():
        return None
    try:
        with plain_path(folder) as plain:
            return ocp.JsonCheckpointHandler().restore(plain / CHECKSUMS)
    except Exception as error:
        raise unreadable(folder, error) from error


def read_json(folder: Path) -> dict[str, Any]:
    """The metadata in a checkpoint's folder, which are those that were saved."""
    import orbax.checkpoint as ocp

    try:
        with plain_path(folder) as plain:
            metadata = ocp.JsonCheckpointHandler().restore(plain / METADATA)
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no object")
    except Exception as error:
        raise unreadable(folder, error) from error
    if (expected := read_checksums(folder)) is not None:
        _compare(folder, expected, digests({}, metadata))
    return metadata


def read_shapes(folder: Path) -> PyTree:
    """Nested dicts and lists of objects with `shape` and `dtype`; no array is read."""
    import orbax.checkpoint as ocp

    try:
        with plain_path(folder) as plain:
            return ocp.PyTreeCheckpointHandler().metadata(plain / STATE).tree
    except Exception as error:
        raise unreadable(folder, error) from error


def read_arrays(folder: Path, tree: PyTree) -> PyTree:
    """The numpy arrays of `tree`, which is `read_shapes` of the folder or a part of it."""
    import orbax.checkpoint as ocp

    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    try:
        with plain_path(folder) as plain:
            return ocp.PyTreeCheckpointHandler().restore(
                plain / STATE,
                args=ocp.args.PyTreeRestore(
                    item=tree,
                    restore_args=jax.tree.map(lambda _: as_numpy, tree),
                    partial_restore=True,
                ),
            )
    except Exception as error:
        raise unreadable(folder, error) from error


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path; the same for a NamedTuple or tuple as for the dict or list orbax reads."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def fit(folder: Path, like: PyTree, added: Collection[str] = ()) -> PyTree:
    """The state in a checkpoint's folder, see `fedasr.training.checkpoint.Checkpointer.restore`."""
    tree = read_shapes(folder)
    saved, wanted = by_path(tree), by_path(like)
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

    arrays = by_path(read_arrays(folder, tree))
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
