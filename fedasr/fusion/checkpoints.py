"""Merging checkpoints that others made: folders of safetensors in, a user's score, a folder out."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedasr.errors import UserError
from fedasr.fusion import folders
from fedasr.fusion.folders import Folder, Model
from fedasr.fusion.outside import Score
from fedasr.fusion.tasks import Task

TAKES = ("arrays", "folder")


class Parents(NamedTuple):
    """Checkpoints of one architecture.

    folders: theirs. models: what is merged of each, see `folders.parts`. rest: the other tensors.
    digests: SHA-256 of each. base: what they were trained from, as of `models`, or None.
    """

    folders: list[Folder]
    models: list[Model]
    rest: Model
    digests: list[str]
    base: Model | None

    def whole(self, model: Model) -> Model:
        """A merged model with all tensors, in the first checkpoint's types; read-only."""
        return folders.whole(self.folders[0], model, self.rest)

    def average(self) -> Model:
        """The mean of the models."""
        return {
            name: np.mean([m[name] for m in self.models], axis=0, dtype=np.float32).astype(
                value.dtype
            )
            for name, value in self.models[0].items()
        }


def load_parents(
    names: Sequence[str | Path],
    base: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Parents:
    """Reads checkpoints.

    Args:
      names: see `folders.open_folder`; the merged one is written as the first is. base: what they
        were trained from, if known. say: takes a line for what differs and does not matter.

    Raises:
      UserError: what `folders` raises: nothing there, other tensors, quantised weights.
    """
    opened = [folders.open_folder(name) for name in names]
    start = [folders.open_folder(base)] if base else []
    folders.compare([*opened, *start] if len(opened) > 1 else opened, say)
    read = [folders.read(one, opened[0]) for one in [*opened, *start]]
    models, rest = folders.parts([model for model, _ in read[: len(opened)]], opened)
    first = None
    if start:
        first = folders.parts([read[0][0], read[-1][0]], [opened[0], start[0]])[0][1]
    return Parents(opened, models, rest, [digest for _, digest in read], first)


def load_score(text: str) -> Callable[[Any], Any]:
    """The function that --score names.

    Args:
      text: MODULE:FUNCTION, or FILE.py:FUNCTION. Modules in the working directory are found.

    Raises:
      UserError: it is written otherwise, cannot be imported, or is no function.
    """
    module, _, name = text.rpartition(":")
    if not module or not name:
        raise UserError(f"--score={text}: write MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        if module.endswith(".py"):
            if not Path(module).is_file():
                raise UserError(f"--score={text}: there is no file {module}")
            spec: Any = importlib.util.spec_from_file_location(Path(module).stem, module)
            found = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(Path(module).stem, found)
            spec.loader.exec_module(found)
        else:
            sys.path.insert(0, os.getcwd())  # as `python -m` has it
            found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--score={text}: {module} cannot be imported ({error})") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise UserError(f"--score={text}: {module} has no function {name}")
    return function


def make_score(
    parents: Parents, function: Callable[[Any], Any], takes: str, scratch: Path
) -> Score:
    """A user's function as a score of what is merged.

    Args:
      parents: whose other tensors and files a candidate gets. function: the user's. takes: one of
        `TAKES`: {tensor's name: read-only array}, or the path of a folder as `folders.write` makes
        it, for libraries that read no other. scratch: for that folder, used again every time.
    """
    if takes == "arrays":

        def of_arrays(model: Model) -> Any:
            return function(parents.whole(model))

        return of_arrays

    def of_folder(model: Model) -> Any:
        return function(str(folders.write(parents.folders[0], parents.whole(model), scratch)))

    return of_folder


def checkpoints_task(parents: Parents, points: int, score: str, chromosomes: str = "") -> Task:
    """What `make_method` needs; scores come from outside, see `fedasr.fusion.outside`.

    Args:
      parents: the checkpoints. points: that they are scored on; MAP-Elites tells those at odd
        places from those at even ones. score: its name, for the run's identity. chromosomes: a
        regular expression, see `by_pattern`; "" for the model as one.

    Raises:
      UserError: for an expression that is none.
    """

    def inside(model: Any) -> Any:
        raise NotImplementedError("scores of checkpoints come from outside")

    return Task(
        inside,
        lambda key: jax.tree.map(lambda *x: np.stack(x), *parents.models),
        lambda params: {},
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parents.models[0]),
        parents.base,
        0.0,
        np.arange(points) % 2 == 1,
        {
            "task": "checkpoints",
            "models": parents.digests,
            "score": score,
            "chromosomes": chromosomes,
            "points": points,
        },
        by_pattern(chromosomes) if chromosomes else None,
    )


def by_pattern(pattern: str) -> Callable[[str], str]:
    r"""Chromosomes of tensors: those whose names have the same match are one, all others another.

    Args:
      pattern: regular expression, such as `layers\.\d+` for every layer on its own; its first
        group, if it has one, is what must be the same: `(attn)` for attention apart from the rest.

    Raises:
      UserError: if it is none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--chromosomes={pattern}: {error}") from error

    def name(path: str) -> str:
        if (found := compiled.search(path)) is None:
            return ""
        return f"={found[1] or '' if compiled.groups else found[0]}"

    return name
