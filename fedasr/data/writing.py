"""Writing corpora as the splits of one on disk, in the form that `fedasr.data.records` reads."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data.corpus import Corpus, all_lengths, user_hashes, valid_split_name
from fedasr.data.records import FORMAT_VERSION, INDEX, METADATA_FILE, RECORDS, tfds_module
from fedasr.errors import UserError
from fedasr.fields import check_local

_SHARD_BYTES = 64 << 20  # tfds holds one shard in memory while it writes it


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
    check_local("directory", directory)
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
    records = _write_records(directory / RECORDS, splits, arrays, shards)

    described = {}
    for name, corpus in splits.items():
        _write_index(directory / INDEX / name, corpus, arrays)
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


@functools.cache
def _builder_class() -> type:
    """The tfds builder, made on first use because tfds is optional."""
    tfds = tfds_module()
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
    tfds = tfds_module()
    builder = _builder_class()(
        splits, arrays, shards, data_dir=directory, file_format="array_record"
    )
    builder.download_and_prepare(
        download_dir=directory / "downloads",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    shutil.rmtree(directory / "downloads", ignore_errors=True)
    return Path(builder.data_dir)
