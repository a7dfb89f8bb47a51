"""The layouts in which speech lies on disk, each a module of this package that is named here.

A module has two functions: `detect(path) -> bool` says, without reading much, whether a path looks
like its layout, and `open_source(path, options) -> Source` reads it. A new layout is one such
module and one line in `LAYOUTS`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedasr.data import identity
from fedasr.data.conversion import Rejected, Utterance
from fedasr.data.corpus import valid_split_name
from fedasr.data.recordings import Recording, file_state
from fedasr.errors import UserError


@dataclass(frozen=True)
class SourceOptions:
    """What a person may say of a source.

    Attributes:
      language: of the transcripts; None where the source says it, or for English.
      user_key, text_key, audio_key: names of the fields or columns, where they are not the usual.
      metadata: further fields to carry through.
      pipes: run the commands that a Kaldi `wav.scp` holds.
    """

    language: str | None = None
    user_key: str | None = None
    text_key: str | None = None
    audio_key: str | None = None
    metadata: tuple[str, ...] = ()
    pipes: bool = False


@runtime_checkable
class Source(Protocol):
    """Utterances in the same order every time, and what is known of them all.

    Attributes:
      name: for people. fingerprint: changes with the contents. total: number of items. notes:
      counts for the summary. language: of the transcripts, or None where nothing says it.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def total(self) -> int: ...

    @property
    def notes(self) -> Mapping[str, int]: ...

    @property
    def language(self) -> str | None: ...

    def __iter__(self) -> Iterator[Utterance | Rejected]: ...


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
        return importlib.import_module(f"fedasr.data.{self.module}")


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


@dataclass
class Listed:
    """A source whose items are all known when it is opened; see `Source`."""

    name: str
    items: Sequence[Utterance | Rejected]
    notes: Mapping[str, int] = field(default_factory=dict)
    language: str | None = None

    def __iter__(self) -> Iterator[Utterance | Rejected]:
        return iter(self.items)

    @property
    def total(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """Of what the items say and of the sizes and times of change of their files."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps(facts(item)).encode())
        return digest.hexdigest()


def facts(item: Utterance | Rejected) -> list[Any]:
    """What decides about an item, as JSON: for fingerprints."""
    if isinstance(item, Rejected):
        return [item.id, item.reason, item.detail]
    found: list[Any] = [item.id, item.user, item.text, item.split, dict(item.metadata)]
    if isinstance(audio := item.audio, Recording):
        found += [audio.start, audio.stop, audio.stated, audio.channel]
        if isinstance(audio.file, bytes):
            found.append(hashlib.sha256(audio.file).hexdigest())
        else:
            found += [os.fspath(audio.file), *file_state(Path(audio.file))]
    return found


def read_text(path: Path) -> list[tuple[int, str | None]]:
    """(number, line) of the lines of a text file that are not blank; None for one not in UTF-8.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines: list[tuple[int, str | None]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                lines.append((number, line.decode("utf-8").strip()))
            except UnicodeDecodeError:
                lines.append((number, None))
    return lines


def find_file(folder: Path, name: str) -> str:
    """The file that a name means: relative to a folder, or to one of those above it.

    Recipes write names relative to where they ran, which is mostly a folder above the data.
    """
    if not os.path.isabs(name):
        for above in (folder, *folder.parents[:4]):
            found = identity.resolved(above, name)
            if found.is_file():
                return os.fspath(found)
    return os.fspath(identity.resolved(folder, name))


def split_of(name: str) -> str | None:
    """A folder's or file's name as that of a split; None where it cannot be one."""
    name = name.replace("-", "_").replace(".", "_")
    return name if valid_split_name(name) else None
