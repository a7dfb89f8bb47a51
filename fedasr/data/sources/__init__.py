"""The layouts in which speech lies on disk, each a module of this package that is named here.

A module has two functions: `detect(path) -> bool` says, without reading much, whether a path looks
like its layout, and `open_source(path, options) -> Source` reads it. A new layout is one such
module and one line in `LAYOUTS`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedasr.data.sources.source import Source, SourceOptions
from fedasr.errors import UserError

__all__ = ["LAYOUTS", "Layout", "Source", "SourceOptions", "detect_layout", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """A layout: its name for `--dataset`, what it is for people, and the module that reads it."""

    name: str
    title: str
    module: str

    def detect(self, path: Path) -> bool:
        """Whether a path looks like this layout."""
        return self._module().detect(path)

    def open(self, path: str | os.PathLike[str], options: SourceOptions | None = None) -> Source:
        """Reads it; raises UserError where it is something else."""
        return self._module().open_source(Path(path).absolute(), options or SourceOptions())

    def _module(self) -> Any:
        return importlib.import_module(f"fedasr.data.sources.{self.module}")


# In the order in which `--inspect` tries them: those that are easiest to tell come first.
LAYOUTS = (
    Layout("librispeech", "LibriSpeech", "librispeech"),
    Layout("common_voice", "a release of Common Voice", "common_voice"),
    Layout("kaldi", "a Kaldi data directory", "kaldi"),
    Layout("tedlium", "TED-LIUM (STM and SPHERE)", "tedlium"),
    Layout("lhotse", "a lhotse manifest", "lhotse"),
    Layout("huggingface", "a Hugging Face audio dataset", "huggingface"),
    Layout("manifest", "a manifest", "manifest"),
)


def find_layout(name: str) -> Layout:
    """The layout of a name.

    Raises:
      UserError: no such layout.
    """
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise UserError(f"no layout {name!r}: use one of {', '.join(x.name for x in LAYOUTS)}")


def detect_layout(path: str | os.PathLike[str]) -> Layout | None:
    """The first layout that a path looks like."""
    path = Path(path).absolute()
    return next((layout for layout in LAYOUTS if layout.detect(path)), None)
