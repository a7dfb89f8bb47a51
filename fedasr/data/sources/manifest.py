"""Manifests: lists of recordings, as JSON lines, a JSON array, CSV or TSV, compressed or not."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedasr.data import identity
from fedasr.data.corpus import valid_split_name
from fedasr.data.recordings import Recording
from fedasr.data.sources.source import SourceOptions, facts
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

# The first that a line has counts.
AUDIO_KEYS = ("audio_filepath", "audio_path", "path", "file_name", "file", "wav_filename", "audio")
TEXT_KEYS = ("text", "sentence", "transcript", "transcription")
USER_KEYS = ("user", "speaker", "speaker_id", "client_id")
METADATA_KEYS = ("age", "gender", "sex", "accent", "accents", "dialect", "device", "locale")
_START_KEYS = ("offset", "start", "start_time", "begin", "begin_time")
_END_KEYS = ("end", "end_time", "stop", "stop_time")
_KNOWN = {
    *(AUDIO_KEYS + TEXT_KEYS + USER_KEYS + METADATA_KEYS),
    *("id", "split", "duration", "channel"),
    *(_START_KEYS + _END_KEYS),
    *(f"{key}_ms" for key in (*_START_KEYS, *_END_KEYS, "duration")),
}
# A field that may say which part of a recording is meant must not be passed over.
_TIMES = re.compile(r"(^|_)(offset|start|begin|end|stop|until|crop|trim)(_|$)", re.IGNORECASE)
_TOLERANCE = 0.1  # seconds by which an end and a duration may disagree
_TABLES = (".csv", ".tsv")
_NOTED_FIELDS = 20
REASON = "bad_manifest_line"


class Manifest:
    """A manifest as a source; see `read_manifest` and `fedasr.data.sources.Source`."""

    language: str | None = None

    def __init__(self, path: str | os.PathLike[str], options: SourceOptions | None = None) -> None:
        self._path, self._options = Path(path), options
        self.name = f"manifest {path}"
        unused: Counter[str] = Counter()
        self.fingerprint, self.total = manifest_fingerprint(path, options, unused)
        named = unused.most_common(_NOTED_FIELDS)
        self.notes = {f"lines with the unused field {name!r}": count for name, count in named}
        if rest := len(unused) - len(named):
            self.notes["further unused fields"] = rest

    def __iter__(self) -> Iterator[Utterance | Rejected]:
        return read_manifest(self._path, self._options)


def detect(path: Path) -> bool:
    """Whether this is a file that may be a manifest."""
    return path.is_file() and path.name.removesuffix(".gz").endswith(
        (".json", ".jsonl", ".ndjson", ".manifest", ".txt", *_TABLES)
    )


def open_source(path: Path, options: SourceOptions) -> Manifest:
    """Opens a manifest; raises UserError as `read_manifest`."""
    return Manifest(path, options)


def read_manifest(
    path: str | os.PathLike[str],
    options: SourceOptions | None = None,
    unused: Counter[str] | None = None,
) -> Iterator[Utterance | Rejected]:
    """Reads a manifest: one JSON object a line, an array of them, or a table with a header.

    A line holds `audio_filepath` (absolute, or relative to the manifest's folder), `text` and
    `user` (or `speaker`, `speaker_id`, `client_id`), and may hold `split` (see
    `fedasr.data.preparation.prepare.prepare`) and `id` (by default `audio_filepath`, with the times
    of a part).
    Audio is what `fedasr.data.recordings.read_audio` reads, and is read only when `audio()` is
    called.

    `offset` or `start` with `duration` or `end`, in seconds (in milliseconds with `_ms`), cut a
    part out of the recording. `duration` alone is a statement about the file that is checked.
    `channel` takes one channel, from 0. `age`, `gender`, `accents`, `device`, `locale` and the like
    are carried through; other fields are passed over, unless they look like times.

    Tables are separated by tabs, commas or semicolons. Everything is UTF-8 (or UTF-16 with its
    mark), and may be compressed with gzip.

    Args:
      path: the manifest.
      options: names of fields, where they are others.
      unused: counts the lines that have fields which are passed over, by field.

    Yields:
      An `Utterance`, or for a line that cannot be used a `Rejected` ("bad_manifest_line").

    Raises:
      UserError: the manifest cannot be read or holds no line, or a table lacks a column.
    """
    path = Path(path)
    options = options or SourceOptions()
    found = False
    for where, entry in entries(path, options):
        found = True
        if isinstance(entry, str):
            yield Rejected(where, REASON, entry)
        else:
            yield utterance_of(entry, where, path.parent, options, unused)
    if not found:
        raise UserError(f"the manifest {path} is empty: write one JSON object a line into it")


def manifest_fingerprint(
    path: str | os.PathLike[str],
    options: SourceOptions | None = None,
    unused: Counter[str] | None = None,
) -> tuple[str, int]:
    """A digest of a manifest and of the sizes and times of change of the audio it names.

    Returns:
      (digest, number of lines that are not blank).

    Raises:
      UserError: as `read_manifest`.
    """
    digest = hashlib.sha256()
    lines = 0
    for item in read_manifest(path, options, unused):
        lines += 1
        digest.update(json.dumps(facts(item)).encode())
    return digest.hexdigest(), lines


# ---------------------------------------------------------------------------------------- lines


def entries(path: Path, options: SourceOptions | None = None) -> Iterator[tuple[str, Any]]:
    """(where, object or why there is none) of each line of a manifest that is not blank.

    Raises:
      UserError: it cannot be read (to its end), is no text, an array that is no JSON, or a table
        without a proper header.
    """
    try:
        yield from _entries(path, options or SourceOptions())
    except (OSError, EOFError, zlib.error) as error:
        detail = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"the manifest {path} cannot be read: {detail}") from error


def _entries(path: Path, options: SourceOptions) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as raw:
        start = raw.read(2)
        raw.seek(0)
        file: Any = gzip.open(raw) if start == b"\x1f\x8b" else raw
        head = _head(file)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            try:
                file = io.BytesIO(file.read().decode("utf-16").encode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"the manifest {path} is no text: {error}") from error
            head = _head(file)
        text = head.lstrip(b" \t\r\n\xef\xbb\xbf")
        if _is_table(path, text, options):
            yield from _table(file, path)
        elif text.startswith(b"[") and _is_array(text):
            yield from _array(file.read(), path)
        else:
            for number, line in enumerate(file, start=1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield f"line {number}", _parsed(line)


def _head(file: Any) -> bytes:
    head = file.read(1 << 16)
    file.seek(0)
    return head


def _parsed(line: bytes) -> Any:
    try:
        return _strict(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"


def _strict(text: str) -> Any:
    """JSON in which a field that stands twice is a mistake; how it ends is unknown."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
            raise ValueError(f"the field {twice!r} stands twice")
        return fields

    return json.loads(text, object_pairs_hook=once)


def _is_array(text: bytes) -> bool:
    """Whether what begins with "[" is an array of objects, not a line that is an array."""
    return text[1:].lstrip()[:1] in (b"{", b"]", b"")


def _array(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        entries = _strict(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the manifest {path} is no JSON: {error}") from error
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", entry


def _is_table(path: Path, text: bytes, options: SourceOptions) -> bool:
    if text.startswith((b"{", b"[")):
        return False
    if path.name.removesuffix(".gz").endswith(_TABLES):
        return True
    names = {name.strip(' "\r') for name in _split(_first_line(text))}
    return len(names & {*AUDIO_KEYS, *TEXT_KEYS, *USER_KEYS, options.user_key}) >= 2


def _first_line(text: bytes) -> str:
    return text.split(b"\n", 1)[0].decode("utf-8", "replace")


def _separator(header: str) -> str:
    return max("\t,;", key=header.count)


def _split(header: str) -> list[str]:
    return header.split(_separator(header))


def _table(file: Any, path: Path) -> Iterator[tuple[str, Any]]:
    stream = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    rows = _rows(stream)
    try:
        _, header = next(rows)
    except StopIteration:
        return
    if isinstance(header, str):
        raise UserError(f"the manifest {path} has no header: {header}")
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        raise UserError(f"the manifest {path} names a column twice in its header: rename one")
    for number, fields in rows:
        where = f"line {number}"
        if isinstance(fields, str):
            yield where, fields
        elif len(fields) != len(names):
            yield where, f"{len(fields)} columns instead of {len(names)}"
        elif any("\udc80" <= c <= "\udcff" for field in fields for c in field):
            yield where, "not UTF-8"
        else:
            yield where, {n: v for n, v in zip(names, fields, strict=True) if v != ""}


def _rows(stream: io.TextIOWrapper) -> Iterator[tuple[int, list[str] | str]]:
    """(number of the line, fields or what is wrong) of a table, blank lines left out."""
    separator = None
    for number, line in enumerate(stream, start=1):
        if not line.strip(" \t\r\n"):
            continue
        separator = separator or _separator(line)
        if separator == "\t":  # quotation marks are characters, but for those around a field
            yield number, [_unquoted(field) for field in line.rstrip("\r\n").split("\t")]
            continue
        # A quotation mark that is never closed would swallow the lines after it.
        try:
            fields = next(csv.reader([line], delimiter=separator, strict=True))
        except (csv.Error, StopIteration) as error:
            yield number, f"no line of a table ({error}): a transcript must stand on one line"
            continue
        yield number, fields


def _unquoted(field: str) -> str:
    if len(field) >= 2 and field[0] == field[-1] == '"':
        return field[1:-1].replace('""', '"')
    return field


# --------------------------------------------------------------------------------------- fields


def utterance_of(
    entry: Any,
    where: str,
    folder: Path,
    options: SourceOptions,
    unused: Counter[str] | None = None,
    content: bytes | None = None,
) -> Utterance | Rejected:
    """The utterance that the fields of a line stand for; see `read_manifest`.

    With the `content` of its recording, `audio_filepath` is only its name, and may be missing.
    """

    if not isinstance(entry, dict):
        return Rejected(where, REASON, "not a JSON object")
    if content is not None and not entry.get("audio_filepath"):
        entry["audio_filepath"] = where
    own_audio = options.audio_key if content is None else None
    keys = {
        "audio_filepath": _key(entry, own_audio, AUDIO_KEYS),
        "text": _key(entry, options.text_key, TEXT_KEYS),
        "user": _key(entry, options.user_key, USER_KEYS),
    }
    carried = {*METADATA_KEYS, *options.metadata}
    try:
        values = {name: _value(entry, name, key) for name, key in keys.items()}
        _check_names(entry)
        start, stop, stated = times_of(entry)
        channel = _channel(entry.get("channel"))
        _count_unused(entry, carried | set(keys.values()), unused)
    except ValueError as error:
        return Rejected(where, REASON, str(error))
    name = values["audio_filepath"]
    part = "" if start is None and stop is None else f"@{start or 0:.3f}-{_end(stop)}"
    return Utterance(
        id=entry.get("id") or name + part,
        user=values["user"],
        text=values["text"],
        split=entry.get("split"),
        audio=Recording(
            os.fspath(identity.resolved(folder, name)) if content is None else content,
            *(start or 0.0, stop, stated, channel),
        ),
        metadata={k: str(entry[k]) for k in sorted(carried) if entry.get(k) not in (None, "")},
    )


def _value(entry: Mapping[str, Any], name: str, key: str) -> str:
    """The text that stands for a recording, its transcript or its user; ValueError without one."""
    value = entry.get(key)
    if name == "user" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        usual = {"audio_filepath": AUDIO_KEYS, "text": TEXT_KEYS, "user": USER_KEYS}[name]
        flag = {"audio_filepath": "audio"}.get(name, name)
        raise ValueError(
            f"{key} is missing: give one of {', '.join(usual)}, or name the field with "
            f"--{flag}_key (there are {', '.join(map(str, entry))[:120]})"
        )
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a string")
    if name != "text" and not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def _check_names(entry: Mapping[str, Any]) -> None:
    """Raises ValueError for a split or an id that is none."""
    for key in ("split", "id"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise ValueError(f"{key} is not a string")
    split = entry.get("split")
    if split is not None and not valid_split_name(split):
        raise ValueError(f"{split!r} cannot be the name of a split")


def _count_unused(
    entry: Mapping[str, Any], used: Collection[str], unused: Counter[str] | None
) -> None:
    """Counts the fields that nothing reads; ValueError for one that may say which part is meant."""
    for name in entry:
        if name in _KNOWN or name in used or entry[name] is None:
            continue
        if _TIMES.search(name):
            raise ValueError(
                f"the field {name!r} may say which part is meant, but is not known: name it start, "
                "end, offset or duration, or leave it out"
            )
        if unused is not None:
            unused[name] += 1


def _end(stop: float | None) -> str:
    return "end" if stop is None else f"{stop:.3f}"


def _key(entry: Mapping[str, Any], own: str | None, usual: tuple[str, ...]) -> str:
    if own is not None:
        return own
    return next((key for key in usual if entry.get(key) is not None), usual[0])


def _channel(value: Any) -> int | None:
    if value is None:
        return None
    number = as_number("channel", value)
    if number < 0 or number != int(number):
        raise ValueError(f"channel is {value!r}, not 0, 1, ...")
    return int(number)


def times_of(entry: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """(start, stop, stated) in seconds: the part that is meant, and the length of the whole file.

    Start and stop are None where the whole file is meant, stated is None where nobody says.

    Raises:
      ValueError: what is said makes no sense, or contradicts itself.
    """
    start = _agreed(entry, _START_KEYS)
    end = _agreed(entry, _END_KEYS)
    duration = _agreed(entry, ("duration",))
    if start is not None and start < 0:
        raise ValueError(f"a part cannot begin at {start} s")
    if duration is not None and duration <= 0:
        raise ValueError(f"the duration is {duration} s")
    if start is None and end is None:
        return None, None, duration
    if end is not None:
        begin = start or 0.0
        if end <= begin:
            raise ValueError(f"a part cannot end at {end} s when it begins at {begin} s")
        if duration is not None and abs(end - begin - duration) > _TOLERANCE:
            raise ValueError(f"{begin} s to {end} s are not the {duration} s of the duration")
        return start, end, None
    if duration is not None:
        return start, (start or 0.0) + duration, None
    return (start, None, None) if start else (None, None, None)


def _agreed(entry: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    """The one value that these fields give, in seconds."""
    found: dict[str, float] = {}
    for key in keys:
        for name, unit in ((key, 1.0), (f"{key}_ms", 1000.0)):
            if entry.get(name) is not None:
                found[name] = as_number(name, entry[name]) / unit
    if len(found) > 1 and max(found.values()) - min(found.values()) > 1e-6:
        raise ValueError(f"{' and '.join(sorted(found))} disagree")
    return next(iter(found.values()), None)


def as_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} is {value!r}, not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}, not a number")
    return number
