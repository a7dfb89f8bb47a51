"""Audio datasets of Hugging Face on disk: parquet, saved to disk, or a folder of audio.

    ROOT/**/SPLIT-00000-of-00002.parquet      as on the Hub, with audio within (or paths to it)
    ROOT/SPLIT/data-00000-of-00001.arrow      written by `save_to_disk`
    ROOT/[SPLIT/]metadata.{csv,jsonl}         an audiofolder: file_name and further columns

The columns are those of `fedasr.data.sources.manifest`, or named by options; the recording is the
column that holds bytes or a path. pyarrow reads the files: `datasets` need not be installed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedasr.data.identity import file_state
from fedasr.data.recordings import AUDIO_ENDINGS, Recording
from fedasr.data.sources import manifest
from fedasr.data.sources.files import split_of, walk
from fedasr.data.sources.source import SourceOptions
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

_TABLES = (".parquet", ".arrow")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SHARD = re.compile(r"^(.*?)[-_.]?\d{4,}(?:-of-\d+)?$")
_BATCH = 16  # rows: each may hold a recording


def detect(path: Path) -> bool:
    """Whether this is such a dataset."""
    if path.is_file():
        return path.suffix == ".parquet"
    patterns = [
        *("*.parquet", "*/*.parquet", "*/*/*.parquet", "dataset_dict.json", "dataset_info.json"),
        *(f"{folder}{name}" for folder in ("", "*/", "*/*/") for name in _METADATA),
    ]
    return path.is_dir() and any(next(path.glob(p), None) for p in patterns)


def open_source(path: Path, options: SourceOptions) -> HuggingFace:
    """Opens a dataset; raises UserError as `HuggingFace`."""
    return HuggingFace(path, options)


class HuggingFace:
    """A dataset as a source; see `fedasr.data.sources.Source`.

    What cannot be used is a `Rejected`: "bad_manifest_line" (a field is missing or makes no sense),
    "missing_audio" (neither bytes nor a path), "unlisted_audio" (in an audiofolder, a recording
    that no line names), and what cannot be visited.

    Raises:
      UserError: it is none, pyarrow is missing, a file is damaged, or a column is not there.
    """

    language: str | None = None

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self._options = options
        unvisited: dict[str, Rejected] = {}
        files = [path] if path.is_file() else list(walk(path, unvisited)) if path.is_dir() else []
        self._tables = [(file, _split(file, path)) for file in files if file.suffix in _TABLES]
        self._lists = [(file, _split(file, path)) for file in files if file.name in _METADATA[:2]]
        if not self._tables and not self._lists:
            raise UserError(
                f"{path} is no audio dataset of Hugging Face: give a folder with parquet files, "
                "one written by save_to_disk, or one with metadata.csv"
            )
        self.name = f"Hugging Face {path}"
        unused: Counter[str] = Counter()
        count, named, self.fingerprint = self._look_through(unused)
        sounds = [file for file in files if file.suffix.lower() in AUDIO_ENDINGS]
        self._rejected: list[Rejected] = list(unvisited.values())
        self._rejected += [
            Rejected(os.fspath(file.relative_to(path)), "unlisted_audio", "no line names it")
            for file in sounds
            if os.path.realpath(file) not in named
        ]
        self.total = count + len(self._rejected)
        self.notes = {f"lines with the unused field {k!r}": n for k, n in unused.most_common(20)}

    def _look_through(self, unused: Counter[str]) -> tuple[int, set[str], str]:
        """(number of items, files of the recordings, fingerprint); counts unused fields."""
        named: set[str] = set()
        count = 0
        digest = hashlib.sha256(repr(self._options).encode())
        for file, _ in (*self._tables, *self._lists):
            digest.update(json.dumps([os.fspath(file), *file_state(file)]).encode())
        for item in self._items(unused):
            count += 1
            if not isinstance(item, Utterance) or not isinstance(item.audio, Recording):
                continue
            if not isinstance(sound := item.audio.file, bytes):
                named.add(os.fspath(sound))
                digest.update(json.dumps(file_state(Path(sound))).encode())
        return count, named, digest.hexdigest()

    def __iter__(self) -> Iterator[Utterance | Rejected]:
        """The rejected first, then the utterances."""
        yield from self._rejected
        yield from self._items(None)

    def _items(self, unused: Counter[str] | None) -> Iterator[Utterance | Rejected]:
        named = dataclasses.replace(self._options, audio_key=None)  # by `_rows`
        for file, split in self._tables:
            for row, entry in enumerate(_rows(file, self._options)):
                where = f"{file.name} row {row}"
                yield self._item(entry, where, file.parent, split, named, unused)
        for file, split in self._lists:
            for where, entry in manifest.entries(file, self._options):
                where = f"{file.parent.name}/{file.name} {where}"
                if isinstance(entry, str):
                    yield Rejected(where, manifest.REASON, entry)
                else:
                    yield self._item(entry, where, file.parent, split, self._options, unused)

    def _item(
        self,
        entry: Any,
        where: str,
        folder: Path,
        split: str | None,
        options: SourceOptions,
        unused: Counter[str] | None,
    ) -> Utterance | Rejected:
        if not isinstance(entry, dict):
            return Rejected(where, manifest.REASON, "not an object")
        entry = dict(entry)
        content = entry.pop(None, None)  # of the recording, where it lies within the table
        if split is not None and "split" not in entry:
            entry["split"] = split
        return manifest.utterance_of(entry, where, folder, options, unused, content)


def _split(file: Path, root: Path) -> str | None:
    """The split that a file's name or folder says."""
    shard = _SHARD.match(file.stem)
    stem = shard[1] if shard else file.stem
    if file.suffix == ".parquet" and stem not in ("", "data", "metadata", "part"):
        return split_of(stem)
    if file.parent != root and file != root:
        name = file.parent.name
        return split_of(name) if name != "data" else None
    return None


def _rows(file: Path, options: SourceOptions) -> Iterator[dict[Any, Any]]:
    """The rows of a table; the recording is a path under its column's name, or bytes under None."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UserError(
            f"reading {file.name} needs pyarrow ({error}): pip install 'fedasr[huggingface]'"
        ) from error
    try:
        if file.suffix == ".parquet":
            opened = parquet.ParquetFile(file)
            schema, batches = opened.schema_arrow, opened.iter_batches(_BATCH)
        else:
            reader: Any
            with open(file, "rb") as raw:
                magic = raw.read(6)
            reader = ipc.open_file(file) if magic == b"ARROW1" else ipc.open_stream(file)
            schema = reader.schema
            batches = (
                iter(reader)
                if magic != b"ARROW1"
                else map(reader.get_batch, range(reader.num_record_batches))
            )
        column = _audio_column(schema, options, file)
        for batch in batches:
            for row in batch.to_pylist():
                yield _with_audio(row, column)
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{file} is damaged or incomplete ({detail}): download it again") from error


def _audio_column(schema: Any, options: SourceOptions, file: Path) -> str:
    names = list(schema.names)
    if options.audio_key is not None:
        if options.audio_key not in names:
            raise UserError(
                f"{file} has no column {options.audio_key!r}: choose one of {', '.join(names)}"
            )
        return options.audio_key
    for name in names:
        kind = schema.field(name).type
        if str(kind).startswith("struct") and {"bytes", "path"} & {f.name for f in kind}:
            return name
    usual = next((name for name in manifest.AUDIO_KEYS if name in names), None)
    if usual is None:
        raise UserError(
            f"{file} has no column of recordings among {', '.join(names)}: name it with --audio_key"
        )
    return usual


def _with_audio(row: dict[Any, Any], column: str) -> dict[Any, Any]:
    value = row.pop(column)
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    elif isinstance(value, bytes):
        content, path = value, None
    else:
        content, path = None, value
    # Other columns of paths are not the recording.
    row = {k: v for k, v in row.items() if k not in manifest.AUDIO_KEYS}
    if content is not None:
        row[None] = content
    row["audio_filepath"] = path
    return row
