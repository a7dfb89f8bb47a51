"""Where examples come from: user ids, sizes and random access by user, in memory or on disk.

On disk a corpus is a folder:

* `corpus.json`: what the folder holds, written last (a folder without it is no corpus);
* `index/SPLIT/`: user ids, their hashes (see `fedasr.data.splits`), examples per user and the
  lengths of ragged arrays, memory-mapped, so that a million users open at once;
* `records/`: an ArrayRecord data set written by tfds, a user's examples next to each other.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from fedasr.data import recordings
from fedasr.data import splits as splits_lib
from fedasr.data.splits import (
    ReshuffledCorpus,
    all_lengths,
    find_users,
    shared_users,
    user_hashes,
)
from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.audio.features import LogMelConfig

__all__ = [
    "ArrayRecordCorpus",
    "Corpus",
    "Example",
    "FeaturesFromAudio",
    "InMemoryCorpus",
    "ReshuffledCorpus",
    "all_lengths",
    "find_users",
    "has_split",
    "open_corpus",
    "read_metadata",
    "shared_users",
    "user_hashes",
    "valid_split_name",
    "write_corpus",
]

Example = Mapping[str, np.ndarray]

FORMAT_VERSION = 2
METADATA_FILE = "corpus.json"
_RECORDS = "records"
_INDEX = "index"
_SHARD_BYTES = 64 << 20  # tfds holds one shard in memory while it writes it
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@runtime_checkable
class Corpus(Protocol):
    """Examples grouped by user; all examples have arrays of the same names, dtypes and ranks.

    A corpus may also have `all_lengths()` and `user_hashes()`, which say for all users at once
    what the functions of these names in `fedasr.data.splits` otherwise ask for one by one.

    Attributes:
      users: user ids, sorted. A user's index in it identifies the user everywhere else.
      sizes: int64 [num_users], examples per user, each at least 1.
    """

    @property
    def users(self) -> Sequence[str]: ...

    @property
    def sizes(self) -> np.ndarray: ...

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """Length of axis 0 of each ragged array: int32 [sizes[user]] by key. Reads no example."""
        ...

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices` (each in [0, sizes[user])), in that order."""
        ...


def valid_split_name(name: str) -> bool:
    """Whether a split can have this name: letters, digits and underscores, but not "all"."""
    return bool(_SPLIT_NAME.fullmatch(name)) and name.lower() != "all"


class InMemoryCorpus:
    """A corpus held in memory.

    Args:
      users: examples by user id. All examples have the same keys, dtypes and ranks.
      ragged: keys of the arrays whose axis 0 varies in length. By default those that are seen to
        vary; name them where a small corpus may have equal lengths by chance.

    Raises:
      UserError: no user, a user without examples, or examples that do not fit together.
    """

    def __init__(
        self, users: Mapping[str, Sequence[Example]], ragged: Sequence[str] | None = None
    ) -> None:
        if not users:
            raise UserError("the corpus has no users: give at least one")
        self.users: tuple[str, ...] = tuple(sorted(users))
        self._examples = []
        for user in self.users:
            if not len(users[user]):
                raise UserError(f"user {user!r} has no examples: leave the user out")
            self._examples.append(
                [{key: np.asarray(value) for key, value in ex.items()} for ex in users[user]]
            )
        self.sizes = np.asarray([len(examples) for examples in self._examples], np.int64)
        self.ragged = _ragged_keys(self.users, self._examples, ragged)
        self._lengths = [
            {key: np.asarray([len(ex[key]) for ex in examples], np.int32) for key in self.ragged}
            for examples in self._examples
        ]

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """Length of axis 0 of each ragged array: int32 [sizes[user]] by key."""
        return self._lengths[_checked(user, len(self.users), "user")]

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices`, in that order."""
        examples = self._examples[_checked(user, len(self.users), "user")]
        return [examples[_checked(i, len(examples), "example")] for i in indices]


class ArrayRecordCorpus:
    """One split of a corpus prepared on disk; reads are random access and thread-safe.

    Opening reads the metadata and maps the index; the example files are opened by the first `get`.
    Pickling keeps the folder and the split, not the open files.

    Args:
      directory: folder written by `write_corpus` (or `fedasr.data.prepare.prepare`).
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

        folder = self.directory / _INDEX / split
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
    def users(self) -> splits_lib.LazyUsers:
        """User ids, sorted; each is decoded when asked for."""
        return splits_lib.LazyUsers(len(self.sizes), self._user)

    def _user(self, user: int) -> str:
        start = int(self._id_ends[user - 1]) if user else 0
        return bytes(self._ids[start : int(self._id_ends[user])]).decode("utf-8", "surrogatepass")

    def user_hashes(self) -> np.ndarray:
        """See `user_hashes`."""
        return np.asarray(self._hashes)

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `all_lengths`."""
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
        return [self._read(start + _checked(i, stop - start, "example")) for i in indices]

    def _range(self, user: int) -> tuple[int, int]:
        user = _checked(user, len(self.sizes), "user")
        return int(self._offsets[user]), int(self._offsets[user + 1])

    def _read(self, row: int) -> Example:
        source = self._open()
        try:
            # One by one: array_record starts threads for every request of several.
            example = source[row]
        except Exception as error:
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
        tfds = _tfds()
        folder = self.directory / self.metadata["records"]
        try:
            source = tfds.builder_from_directory(folder).as_data_source(self.split)
            rows = len(source)
        except Exception as error:
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


class FeaturesFromAudio:
    """A corpus of audio as one of features, which are computed when they are read.

    Args:
      corpus: holds "audio", int16 [samples] at the sample rate of `config`.
      config: parameters of the features.
    """

    def __init__(self, corpus: ArrayRecordCorpus, config: LogMelConfig) -> None:
        self._corpus, self._config = corpus, config
        self.metadata = corpus.metadata
        self.sizes = corpus.sizes

    @property
    def users(self) -> splits_lib.LazyUsers:
        """User ids, sorted."""
        return self._corpus.users

    def user_hashes(self) -> np.ndarray:
        """See `user_hashes`."""
        return self._corpus.user_hashes()

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """Lengths of "features" (frames) and of the other ragged arrays: int32 [sizes[user]]."""
        return self._with_frames(self._corpus.lengths(user))

    def all_lengths(self) -> dict[str, np.ndarray]:
        """See `all_lengths`."""
        return self._with_frames(self._corpus.all_lengths())

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """The user's examples at `indices`: "features" float16 [frames, mels] for "audio"."""
        return [self._with_features(example) for example in self._corpus.get(user, indices)]

    def _with_frames(self, lengths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        hop, frame = self._config.hop_samples, self._config.frame_samples
        frames = np.maximum(0, 1 + (lengths["audio"] - frame) // hop).astype(np.int32)
        others = {key: values for key, values in lengths.items() if key != "audio"}
        return {"features": frames, **others}

    def _with_features(self, example: Example) -> Example:
        from fedasr.audio.features import INT16_SCALE

        waveform = example["audio"].astype(np.float32) / np.float32(INT16_SCALE)
        features = recordings.log_mel_on_cpu(waveform, self._config).astype(np.float16)
        others = {key: value for key, value in example.items() if key != "audio"}
        return {"features": features, **others}


def open_corpus(directory: str | os.PathLike[str], split: str) -> Corpus:
    """Opens a split of a prepared corpus, or a part made of its splits.

    Args:
      directory: folder written by `write_corpus` (or `fedasr.data.prepare.prepare`).
      split: a stored split or an expression such as "train[:10%]" (see `fedasr.data.splits`).

    Returns:
      The corpus. Examples of prepared speech hold "features" and "labels" whether features or
      audio are stored.

    Raises:
      UserError: as `ArrayRecordCorpus`, or an expression that makes no sense.
    """
    metadata = read_metadata(directory)

    def open_split(name: str) -> Corpus:
        corpus = ArrayRecordCorpus(directory, name)
        options = metadata.get("options", {})
        if options.get("store") != "audio":
            return corpus
        from fedasr.audio.features import LogMelConfig

        return FeaturesFromAudio(corpus, LogMelConfig(**options["features"]))

    return splits_lib.resolve(split, metadata["splits"], open_split, os.fspath(directory))


def has_split(corpus: str | os.PathLike[str] | Mapping[str, Any], split: str) -> bool:
    """Whether a prepared corpus has all that a split expression names.

    Args:
      corpus: its folder, or its metadata.
      split: a stored split or an expression (see `fedasr.data.splits`).

    Raises:
      UserError: the folder is no corpus, or `split` is not an expression at all.
    """
    metadata = corpus if isinstance(corpus, Mapping) else read_metadata(corpus)
    return splits_lib.can_open(split, metadata["splits"])


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
        raise UserError(f"{path} is damaged ({error}): prepare the corpus again") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}: "
            "prepare the corpus again"
        )
    return metadata


def write_corpus(
    directory: str | os.PathLike[str],
    splits: Mapping[str, Corpus],
    metadata: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes corpora as the splits of one corpus on disk, `corpus.json` last.

    Args:
      directory: folder to write into; it should be empty or absent.
      splits: a corpus by split name; all have the same arrays. Examples are read one by one.
      metadata: anything that JSON holds, stored in `corpus.json`.
      shard_bytes: about how large an example file becomes; memory in use is about twice this.

    Raises:
      UserError: no split, a name that cannot be one, or examples that do not fit together.
    """
    directory = Path(directory).absolute()
    if not splits:
        raise UserError("a corpus needs at least one split")
    for name in splits:
        if not valid_split_name(name):
            raise UserError(
                f"{name!r} cannot be the name of a split: use letters, digits and underscores"
            )
        users = list(splits[name].users)
        if not users or users != sorted(set(users)):
            raise UserError(f"the users of split {name!r} must be sorted, each once, at least one")
    arrays = _array_specs(splits)
    directory.mkdir(parents=True, exist_ok=True)
    shards = {name: _shards(corpus, arrays, shard_bytes) for name, corpus in splits.items()}
    records = _write_records(directory / _RECORDS, splits, arrays, shards)

    described = {}
    for name, corpus in splits.items():
        _write_index(directory / _INDEX / name, corpus, arrays)
        files = [
            records / f"corpus-{name}.array_record-{i:05d}-of-{len(shards[name]):05d}"
            for i in range(len(shards[name]))
        ]
        described[name] = {
            "users": len(corpus.users),
            "examples": int(np.sum(corpus.sizes)),
            "files": {f.relative_to(directory).as_posix(): f.stat().st_size for f in files},
            "shards": [len(rows) for rows in shards[name]],
        }
    content = {
        **(metadata or {}),
        "version": FORMAT_VERSION,
        "records": records.relative_to(directory).as_posix(),
        "arrays": arrays,
        "splits": described,
    }
    temporary = directory / f".{METADATA_FILE}.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, directory / METADATA_FILE)


def _checked(index: int, size: int, what: str) -> int:
    # A negative or too large index would silently read another user's example.
    if not 0 <= index < size:
        raise IndexError(f"{what} {index} is not in [0, {size})")
    return int(index)


def _map_ids(path: Path, ends: np.ndarray) -> np.ndarray:
    """The user ids behind one another in UTF-8: uint8 [bytes], of which `ends` says the parts."""
    size = path.stat().st_size if path.is_file() else None
    if size is None or not len(ends) or size != ends[-1]:
        raise UserError(f"{path} is missing or damaged: prepare the corpus again")
    return np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _ragged_keys(
    users: Sequence[str],
    examples: Sequence[Sequence[Example]],
    ragged: Sequence[str] | None,
) -> tuple[str, ...]:
    """Checks that all examples fit together and returns the ragged keys, sorted."""
    first = examples[0][0]
    if ragged is not None and not set(ragged) <= set(first):
        raise UserError(f"ragged names {sorted(set(ragged) - set(first))}, which no example has")
    lengths: dict[str, set[int]] = {key: set() for key in first}
    for user, user_examples in zip(users, examples, strict=True):
        for example in user_examples:
            _check_like(example, first, user)
            for key, value in example.items():
                lengths[key].add(len(value) if value.ndim else -1)
    for key, values in lengths.items():
        if ragged is not None and (key in ragged) and -1 in values:
            raise UserError(f"{key!r} is a scalar and cannot be ragged")
        if len(values) > 1 and (-1 in values or (ragged is not None and key not in ragged)):
            raise UserError(f"{key!r} varies in length: name it in ragged")
    if ragged is None:
        ragged = [key for key, values in lengths.items() if len(values) > 1]
    return tuple(sorted(ragged))


def _check_like(example: Example, first: Example, user: str) -> None:
    """Raises UserError for an example that differs from the first in more than lengths."""
    if set(example) != set(first):
        raise UserError(
            f"an example of user {user!r} has the arrays {sorted(example)}, others have "
            f"{sorted(first)}: give all examples the same"
        )
    for key, value in example.items():
        if value.dtype != first[key].dtype or value.shape[1:] != first[key].shape[1:]:
            raise UserError(
                f"{key!r} of user {user!r} is {value.dtype}{list(value.shape)}, elsewhere "
                f"{first[key].dtype}{list(first[key].shape)}: only axis 0 may vary"
            )


def _array_specs(splits: Mapping[str, Corpus]) -> dict[str, dict[str, Any]]:
    """dtype, shape of one example and raggedness by key; axis 0 is None where it is ragged."""
    ragged = sorted({key for corpus in splits.values() for key in corpus.lengths(0)})
    specs: dict[str, dict[str, Any]] = {}
    for name, corpus in splits.items():
        example = corpus.get(0, [0])[0]
        found = {
            key: {
                "dtype": value.dtype.name,
                "shape": [None, *value.shape[1:]] if key in ragged else list(value.shape),
                "ragged": key in ragged,
            }
            for key, value in sorted(example.items())
        }
        if not specs:
            specs = found
        elif specs != found:
            raise UserError(f"split {name!r} has the arrays {found}, another split {specs}")
    for key in specs:
        if not re.fullmatch(r"\w+", key):
            raise UserError(f"{key!r} cannot name an array: use letters, digits and underscores")
    return specs


def _shards(corpus: Corpus, arrays: Mapping[str, Any], shard_bytes: int) -> list[range]:
    """Consecutive rows (user, then example) cut where a shard reaches `shard_bytes`."""
    row_bytes = np.zeros(int(np.sum(corpus.sizes)), np.int64)
    lengths = _ragged_lengths(corpus, arrays)
    for key, spec in arrays.items():
        item = np.dtype(spec["dtype"]).itemsize
        row_bytes += (
            item
            * math.prod(n for n in spec["shape"] if n is not None)
            * (lengths[key].astype(np.int64) if spec["ragged"] else 1)
        )
    shard = (np.cumsum(row_bytes) - row_bytes) // shard_bytes
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    stops = [*starts[1:], len(row_bytes)]
    return [range(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


def _ragged_lengths(corpus: Corpus, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    lengths = all_lengths(corpus)
    ragged = [key for key, spec in arrays.items() if spec["ragged"]]
    if missing := [key for key in ragged if key not in lengths]:
        raise UserError(f"no user gives lengths of {missing}, which are ragged in another split")
    return {key: np.asarray(lengths[key], np.int32) for key in ragged}


def _write_index(folder: Path, corpus: Corpus, arrays: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    ids = [user.encode("utf-8", "surrogatepass") for user in corpus.users]
    (folder / "users.bin").write_bytes(b"".join(ids))
    np.save(folder / "user_ends.npy", np.cumsum([len(user) for user in ids], dtype=np.int64))
    np.save(folder / "user_hashes.npy", user_hashes(corpus))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(corpus.sizes)]).astype(np.int64))
    for key, lengths in _ragged_lengths(corpus, arrays).items():
        np.save(folder / f"lengths.{key}.npy", lengths)


def _load_index(path: Path, rows: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)}): prepare again") from error
    if array.shape != (rows,):
        raise UserError(f"{path} holds {array.shape} entries instead of {rows}: prepare again")
    return array


def _tfds() -> Any:
    try:
        import array_record.python.array_record_module  # noqa: F401
        import tensorflow_datasets as tfds

        tfds.core  # noqa: B018  (tfds resolves its modules when they are first used)
    except ImportError as error:
        raise UserError(
            f"reading and writing corpora on disk needs tensorflow-datasets and array-record "
            f"({error}): install them with pip"
        ) from error
    return tfds


@functools.cache
def _builder_class() -> type:
    """The tfds builder, made on first use because tfds is optional."""
    tfds = _tfds()
    base: Any = tfds.core.ShardBasedBuilder

    # Its metaclass, which is not seen by the type checker, takes the keyword.
    class Builder(base, skip_registration=True):  # type: ignore[call-arg]
        """Writes rows of corpora in order: no shuffling, and one shard in memory at a time.

        `GeneratorBasedBuilder` would need TensorFlow to spill what it shuffles to disk.
        """

        name = "corpus"
        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, splits: Any, arrays: Any, shards: Any, **kwargs: Any) -> None:
            self._splits, self._arrays, self._shards = splits, arrays, shards
            super().__init__(**kwargs)

        def _log_download_bytes(self) -> None:
            """Nothing is downloaded, and stdout belongs to the program."""

        _log_download_done = _log_download_bytes

        def _example_writer(self) -> Any:
            """Writes the arrays of an example in a fixed order.

            Protocol buffers order a map differently in every process, and files would differ.
            """
            from tensorflow_datasets.proto import tf_example_pb2

            writer = super()._example_writer()
            write = writer.write

            def write_in_order(path: Any, examples: Any) -> Any:
                parse = tf_example_pb2.Example.FromString
                ordered = (
                    (key, parse(content).SerializeToString(deterministic=True))
                    for key, content in examples
                )
                return write(path, ordered)

            writer.write = write_in_order
            return writer

        def _info(self) -> Any:
            # Raw bytes are stored: tf.Example would turn float16 into a list of float32.
            features = {
                key: tfds.features.Tensor(
                    shape=spec["shape"], dtype=np.dtype(spec["dtype"]), encoding="bytes"
                )
                for key, spec in self._arrays.items()
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Examples grouped by user.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
            return {
                name: [
                    functools.partial(_rows, self._splits[name], self._arrays, rows)
                    for rows in shards
                ]
                for name, shards in self._shards.items()
            }

    return Builder


def _rows(
    corpus: Corpus, arrays: Mapping[str, Any], rows: range
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    offsets = np.concatenate([[0], np.cumsum(corpus.sizes)])
    dtypes = {key: np.dtype(spec["dtype"]) for key, spec in arrays.items()}
    user = int(np.searchsorted(offsets, rows.start, side="right")) - 1
    for row in rows:
        if row >= offsets[user + 1]:
            user += 1  # every user has an example
        example = corpus.get(user, [row - int(offsets[user])])[0]
        for key, spec in arrays.items():
            value = example.get(key)
            shape = None if value is None else list(value.shape)
            if shape is not None and spec["ragged"]:
                shape[:1] = [None]
            if value is None or shape != spec["shape"] or value.dtype != dtypes[key]:
                raise UserError(
                    f"{key!r} of user {corpus.users[user]!r} does not fit {spec}: give all "
                    "examples the same arrays, dtypes and trailing shapes"
                )
        yield row, {key: example[key] for key in arrays}


def _write_records(
    directory: Path,
    splits: Mapping[str, Corpus],
    arrays: Mapping[str, Any],
    shards: Mapping[str, list[range]],
) -> Path:
    tfds = _tfds()
    builder = _builder_class()(
        splits, arrays, shards, data_dir=directory, file_format="array_record"
    )
    builder.download_and_prepare(
        download_dir=directory / "downloads",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    shutil.rmtree(directory / "downloads", ignore_errors=True)
    return Path(builder.data_dir)
