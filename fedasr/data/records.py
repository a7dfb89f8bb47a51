"""A corpus prepared on disk, and how to open it.

It is a folder:

* `corpus.json`: what the folder holds, written last (a folder without it is no corpus);
* `index/SPLIT/`: user ids, their hashes (see `fedasr.data.corpus`), examples per user and the
  lengths of ragged arrays, memory-mapped, so that a million users open at once;
* `records/`: an ArrayRecord data set written by tfds, a user's examples next to each other.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data import splits
from fedasr.data.corpus import Corpus, Example, LazyUsers, checked
from fedasr.data.views import AudioBlocks, FeaturesFromAudio
from fedasr.errors import UserError, pass_exhaustion

FORMAT_VERSION = 2
METADATA_FILE = "corpus.json"
RECORDS = "records"
INDEX = "index"


class ArrayRecordCorpus:
    """One split of a corpus prepared on disk; reads are random access and thread-safe.

    Opening reads the metadata and maps the index; the example files are opened by the first `get`.
    Pickling keeps the folder and the split, not the open files.

    Args:
      directory: folder written by `write_corpus` (or `fedasr.data.preparation.prepare.prepare`).
      split: name of the split.

    Raises:
      UserError: the folder is not a prepared corpus, has no such split, or a file is missing or
        damaged (named in the message; damage inside the example files shows in `get`).
    """

    def __init__(self, directory: str | os.PathLike[str], split: str) -> None:
        self.directory = Path(directory)
        self.split = split
        self.metadata = read_metadata(self.directory)
        splits = self.metadata["splits"]
        if split not in splits:
            raise UserError(
                f"{self.directory} has no split {split!r}: choose one of {', '.join(splits)}"
            )
        self._arrays: dict[str, dict[str, Any]] = self.metadata["arrays"]
        self.ragged = tuple(key for key, spec in self._arrays.items() if spec["ragged"])
        for name, size in splits[split]["files"].items():
            path = self.directory / name
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                what = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise UserError(f"{path} {what}: prepare the corpus again")

        folder = self.directory / INDEX / split
        users, offsets_path = int(splits[split]["users"]), folder / "offsets.npy"
        self._id_ends = _load_index(folder / "user_ends.npy", users)
        self._ids = _map_ids(folder / "users.bin", self._id_ends)
        self._hashes = _load_index(folder / "user_hashes.npy", users)
        self._offsets = _load_index(offsets_path, users + 1)
        self.sizes = np.diff(self._offsets)
        if len(self.sizes) == 0 or self.sizes.min() < 1 or self._offsets[0] != 0:
            raise UserError(f"{offsets_path} is damaged: prepare the corpus again")
        total = int(self._offsets[-1])
        self._lengths = {
            key: _load_index(folder / f"lengths.{key}.npy", total) for key in self.ragged
        }
        self._source: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ArrayRecordCorpus.__init__(self, state["directory"], state["split"])

    @property
    def users(self) -> LazyUsers:
        """User ids, sorted; each is decoded when asked for."""
        return LazyUsers(len(self.sizes), self._user)

    def _user(self, user: int) -> str:
        start = int(self._id_ends[user - 1]) if user else 0
        return bytes(self._ids[start : int(self._id_ends[user])]).decode("utf-8", "surrogatepass")

    def user_hashes(self) -> np.ndarray:
        """See `fedasr.data.corpus.user_hashes`."""
        return np.asarray(self._hashes)

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.all_lengths`."""
        return {key: np.asarray(values) for key, values in self._lengths.items()}

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """Length of axis 0 of each ragged array: int32 [sizes[user]] by key, from the index."""
        start, stop = self._range(user)
        return {key: np.asarray(values[start:stop]) for key, values in self._lengths.items()}

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices`, in that order.

        Raises:
          UserError: an example file cannot be read or does not agree with the index.
        """
        start, stop = self._range(user)
        return [self._read(start + checked(i, stop - start, "example")) for i in indices]

    def _range(self, user: int) -> tuple[int, int]:
        user = checked(user, len(self.sizes), "user")
        return int(self._offsets[user]), int(self._offsets[user + 1])

    def _read(self, row: int) -> Example:
        source = self._open()
        try:
            # One by one: array_record starts threads for every request of several.
            example = source[row]
        except Exception as error:
            pass_exhaustion(error, f"reading example {row} in {self._file_of(row)}")
            raise UserError(
                f"example {row} in {self._file_of(row)} cannot be read "
                f"({_one_line(error)}): prepare the corpus again"
            ) from error
        for key, lengths in self._lengths.items():
            if len(example[key]) != lengths[row]:
                raise UserError(
                    f"example {row} in {self._file_of(row)} has {len(example[key])} {key} where "
                    f"the index says {lengths[row]}: prepare the corpus again"
                )
        return example

    def _open(self) -> Any:
        if self._source is None:
            with self._lock:  # a prefetch thread may be the first to read
                if self._source is None:
                    self._source = self._open_source()
        return self._source

    def _open_source(self) -> Any:
        tfds = tfds_module()
        folder = self.directory / self.metadata["records"]
        try:
            source = tfds.builder_from_directory(folder).as_data_source(self.split)
            rows = len(source)
        except Exception as error:
            pass_exhaustion(error, f"opening {folder}")
            raise UserError(
                f"{folder} cannot be opened ({_one_line(error)}): prepare the corpus again"
            ) from error
        if rows != self._offsets[-1]:
            raise UserError(
                f"{folder} holds {rows} examples of {self.split!r} where the index says "
                f"{self._offsets[-1]}: prepare the corpus again"
            )
        return source

    def _file_of(self, row: int) -> Path:
        split = self.metadata["splits"][self.split]
        shard = int(np.searchsorted(np.cumsum(split["shards"]), row, side="right"))
        return self.directory / list(split["files"])[shard]


def open_corpus(directory: str | os.PathLike[str], split: str, audio: bool = False) -> Corpus:
    """Opens a split of a prepared corpus, or a part made of its splits.

    Args:
      directory: folder written by `write_corpus` (or `fedasr.data.preparation.prepare.prepare`).
      split: a stored split or an expression such as "train[:10%]" (see `fedasr.data.splits`).
      audio: whether "features" are to be blocks of stored audio, see `AudioBlocks`.

    Returns:
      The corpus. Examples of prepared speech hold "features" and "labels" whether features or
      audio are stored.

    Raises:
      UserError: as `ArrayRecordCorpus`, an expression that makes no sense, or no stored audio.
    """
    metadata = read_metadata(directory)
    if audio and metadata.get("options", {}).get("store") != "audio":
        raise UserError(
            f"{directory} holds features, and this model hears audio: prepare it again, with "
            "--store=audio"
        )

    def open_split(name: str) -> Corpus:
        corpus = ArrayRecordCorpus(directory, name)
        options = metadata.get("options", {})
        if options.get("store") != "audio":
            return corpus
        from fedasr.audio.features import LogMelConfig

        view = AudioBlocks if audio else FeaturesFromAudio
        return view(corpus, LogMelConfig(**options["features"]))

    return splits.resolve(split, metadata["splits"], open_split, os.fspath(directory))


def has_split(corpus: str | os.PathLike[str] | Mapping[str, Any], split: str) -> bool:
    """Whether a prepared corpus has all that a split expression names.

    Args:
      corpus: its folder, or its metadata.
      split: a stored split or an expression (see `fedasr.data.splits`).

    Raises:
      UserError: the folder is no corpus, or `split` is not an expression at all.
    """
    metadata = corpus if isinstance(corpus, Mapping) else read_metadata(corpus)
    return splits.can_open(split, metadata["splits"])


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `corpus.json` of a prepared corpus.

    Returns:
      The metadata given to `write_corpus`, with `version`, `records` (folder of the tfds data set),
      `arrays` {key: {dtype, shape, ragged}} and `splits` {split: {users, examples, files, shards}}.

    Raises:
      UserError: the folder is not a prepared corpus of this version.
    """
    path = Path(directory) / METADATA_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} is not a prepared corpus (it has no {METADATA_FILE}): prepare one with "
            "fedasr prepare"
        )
    try:
        metadata = json.loads(path.read_bytes())
        version = metadata["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        pass_exhaustion(error, f"reading {path}")
        raise UserError(f"{path} is damaged ({error}): prepare the corpus again") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}: "
            "prepare the corpus again"
        )
    return metadata


def _map_ids(path: Path, ends: np.ndarray) -> np.ndarray:
    """The user ids behind one another in UTF-8: uint8 [bytes], of which `ends` says the parts."""
    size = path.stat().st_size if path.is_file() else None
    if size is None or not len(ends) or size != ends[-1]:
        raise UserError(f"{path} is missing or damaged: prepare the corpus again")
    return np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)


def _load_index(path: Path, rows: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        pass_exhaustion(error, f"reading {path}")
        raise UserError(f"{path} cannot be read ({_one_line(error)}): prepare again") from error
    if array.shape != (rows,):
        raise UserError(f"{path} holds {array.shape} entries instead of {rows}: prepare again")
    return array


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def tfds_module() -> Any:
    """`tensorflow_datasets`, with what it needs for ArrayRecord; UserError where it is missing."""
    try:
        import array_record.python.array_record_module  # noqa: F401
        import tensorflow_datasets as tfds

        tfds.core  # noqa: B018  (tfds resolves its modules when they are first used)
    except ImportError as error:
        pass_exhaustion(error, "importing tensorflow_datasets")
        raise UserError(
            f"reading and writing corpora on disk needs tensorflow-datasets and array-record "
            f"({error}): install them with pip"
        ) from error
    return tfds
