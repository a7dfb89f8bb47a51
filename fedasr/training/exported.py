"""Folders of `fedasr export` in the project's own format, and reading them as checkpoints are read.

A folder holds `model.safetensors` (parameters by path, float32), `config.json` (`FORMAT`, the run's
configuration, the alphabet and the ledger without whom it is about) and `README.md`, the card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedasr.errors import UserError
from fedasr.models.pretrained.mapping import nested
from fedasr.training.remote.copies import local

FORMAT, VERSION = "fedasr", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def safetensors() -> Any:
    """The library's functions for numpy.

    Raises:
      UserError: it is missing.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            f"exported models need safetensors ({error}): pip install 'fedasr[merging]'"
        ) from error
    return safetensors.numpy


def is_exported(path: str | Path) -> bool:
    """Whether a folder is one of ours."""
    return _config(local(path)) is not None


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a checkpoint's metadata says: configuration, stage, units, ledger; and the alphabet.

    Raises:
      UserError: no such folder, or one of a later format.
    """
    found = _config(local(path))
    if found is None:
        raise UserError(f"{path} is no folder of fedasr export: it has no {CONFIG} of that format")
    if found.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {found.get('version')}, this program reads {VERSION}"
        )
    return found


def read_params(path: str | Path) -> Any:
    """The parameters as nested dicts of numpy arrays, every one checked against `config.json`.

    Raises:
      UserError: the file is missing, truncated or not what was exported.
    """
    folder, library = local(path), safetensors()
    shapes = read_metadata(folder)["shapes"]
    try:
        found = library.load_file(folder / WEIGHTS)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / WEIGHTS} cannot be read ({reason}): export again") from error
    theirs = {name: list(value.shape) for name, value in found.items()}
    if different := sorted(n for n in shapes.keys() | theirs if shapes.get(n) != theirs.get(n)):
        name = different[0]
        raise UserError(
            f"{folder / WEIGHTS} is not what was exported: {name} is {theirs.get(name)} there, "
            f"{shapes.get(name)} by {CONFIG}: export again"
        )
    return nested(found)


def flat(params: Any) -> dict[str, np.ndarray]:
    """Parameters by path, float32: what `read_params` reads."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(
            leaf, np.float32, order="C"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
