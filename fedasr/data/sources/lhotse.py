"""Manifests of lhotse (lhotse.readthedocs.io): cuts, or recordings with supervisions.

    cuts.jsonl.gz, or a folder with *cuts*SPLIT.jsonl.gz
    a folder with *recordings*SPLIT.jsonl.gz and *supervisions*SPLIT.jsonl.gz

Files are JSON lines or a JSON array, compressed or not. An utterance is a supervision; the user is
its speaker. Only the manifests are read, by themselves: lhotse need not be installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedasr.data.recordings import Command, Recording
from fedasr.data.sources import manifest
from fedasr.data.sources.files import find_file, split_of
from fedasr.data.sources.source import Listed, SourceOptions
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_KINDS = ("cuts", "supervisions", "recordings")
_NAMED = re.compile(r"(?:^|[_\-.])(cuts|supervisions|recordings)[_\-.]?(.*?)\.jsonl?(?:\.gz)?$")


def detect(path: Path) -> bool:
    """Whether this is a manifest of lhotse, or a folder of them."""
    if path.is_file():
        return path.name.endswith(_ENDINGS) and _kind(path) == "cuts"
    return bool(path.is_dir() and _files(path))


def open_source(path: Path, options: SourceOptions) -> Listed:
    """Reads the manifests of a path.

    What cannot be used is a `Rejected`: "bad_line", "duplicate_id", "missing_audio",
    "missing_transcript", "missing_user", "pipe_refused" (unless `options.pipes`), and
    "unsupported" (mixed cuts, recordings that are to be transformed, sources that are no file).

    Raises:
      UserError: there is none, or a file cannot be read.
    """
    if path.is_file():
        found: dict[tuple[str, str | None], Path]
        found = {(kind, None): path} if (kind := _kind(path)) else {}
    else:
        found = _files(path) if path.is_dir() else {}
    if not found:
        raise UserError(
            f"{path} is no manifest of lhotse: give cuts.jsonl.gz, or a folder with cuts, or with "
            "recordings and supervisions"
        )
    items: list[Utterance | Rejected] = []
    for (kind, split), file in found.items():
        if kind == "cuts":
            items += _from_cuts(file, split, options)
        elif kind == "supervisions":
            recordings = found.get(("recordings", split)) or found.get(("recordings", None))
            if recordings is None:
                raise UserError(f"{file} has no recordings beside it: give the folder of both")
            items += _from_supervisions(file, recordings, split, options)
    if not items:
        raise UserError(f"{path} holds recordings and no supervisions: give the folder of both")
    return Listed(f"lhotse {path}", items)


def _files(folder: Path) -> dict[tuple[str, str | None], Path]:
    """Manifests by (kind, split); where there are cuts, nothing else."""
    found: dict[tuple[str, str | None], Path] = {}
    for path in sorted(folder.iterdir()):
        named = _NAMED.search(path.name)
        if named and path.is_file():
            split = split_of(named[2]) if named[2] else None
            found.setdefault((named[1], split), path)
    kinds = {kind for kind, _ in found}
    if "cuts" in kinds:
        return {key: path for key, path in found.items() if key[0] == "cuts"}
    return found if "supervisions" in kinds else {}


def _kind(path: Path) -> str | None:
    """What the first entry of a file is."""
    try:
        for _, entry in manifest.entries(path):
            if not isinstance(entry, dict):
                return None
            if "supervisions" in entry and "start" in entry:
                return "cuts"
            if "tracks" in entry and "id" in entry:
                return "cuts"
            if "recording_id" in entry:
                return "supervisions"
            return "recordings" if "sources" in entry else None
    except UserError:
        return None
    return None


def _from_cuts(
    file: Path, split: str | None, options: SourceOptions
) -> Iterator[Utterance | Rejected]:
    for where, cut in manifest.entries(file):
        where = f"{file.name} {where}"
        if not isinstance(cut, dict):
            yield Rejected(where, "bad_line", cut if isinstance(cut, str) else "not an object")
            continue
        if cut.get("type") == "MixedCut" or "tracks" in cut:
            yield Rejected(str(cut.get("id", where)), "unsupported", "a mixed cut")
            continue
        try:
            start, length = _number(cut, "start"), _number(cut, "duration")
            supervisions = cut["supervisions"]
            recording = cut["recording"]
            if not isinstance(supervisions, list) or not isinstance(recording, dict):
                raise TypeError("supervisions or recording of the wrong kind")
        except (KeyError, TypeError, ValueError) as error:
            yield Rejected(str(cut.get("id", where)), "bad_line", f"{where}: {error!r}")
            continue
        if not supervisions:
            yield Rejected(str(cut.get("id", where)), "missing_transcript", where)
        for supervision in supervisions:
            yield _utterance(
                supervision, recording, where, file.parent, split, options, start, length
            )


def _from_supervisions(
    file: Path, recordings: Path, split: str | None, options: SourceOptions
) -> Iterator[Utterance | Rejected]:
    known: dict[str, Mapping[str, Any]] = {}
    for where, entry in manifest.entries(recordings):
        where = f"{recordings.name} {where}"
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            yield Rejected(where, "bad_line", entry if isinstance(entry, str) else "no id")
        elif entry["id"] in known:
            yield Rejected(entry["id"], "duplicate_id", where)
        else:
            known[entry["id"]] = entry
    for where, entry in manifest.entries(file):
        where = f"{file.name} {where}"
        if not isinstance(entry, dict):
            yield Rejected(where, "bad_line", entry if isinstance(entry, str) else "not an object")
            continue
        recording = known.get(str(entry.get("recording_id")))
        if recording is None:
            detail = f"no recording {entry.get('recording_id')!r}"
            yield Rejected(str(entry.get("id", where)), "missing_audio", detail)
            continue
        yield _utterance(entry, recording, where, recordings.parent, split, options, 0.0, None)


def _utterance(
    supervision: Any,
    recording: Mapping[str, Any],
    where: str,
    folder: Path,
    split: str | None,
    options: SourceOptions,
    cut: float,
    length: float | None,
) -> Utterance | Rejected:
    """A supervision that begins `cut` seconds later in the recording than it says.

    With a `length` it is one of a cut, and must not reach out of it.
    """
    if not isinstance(supervision, dict):
        return Rejected(where, "bad_line", "a supervision that is no object")
    id = str(supervision.get("id", where))
    custom = supervision.get("custom")
    fields = {**(custom if isinstance(custom, dict) else {}), **supervision}
    text, user = fields.get(options.text_key or "text"), _user(fields, options)
    if not isinstance(text, str):
        return Rejected(id, "missing_transcript", where)
    if user is None:
        return Rejected(id, "missing_user", where)
    try:
        start, duration, whole = _times(supervision, recording, cut, length)
    except (KeyError, TypeError, ValueError) as error:
        return Rejected(id, "bad_line", f"{where}: {error}")
    if recording.get("transforms"):
        return Rejected(id, "unsupported", "a recording that is to be transformed")
    file, channel, problem = _source(recording, supervision.get("channel", 0), folder, options)
    if problem is not None:
        return Rejected(id, *problem)
    # A part that is all of the recording is the recording.
    all_of_it = start < 1e-6 and abs(duration - whole) < 1e-3
    audio = (
        Recording(file, stated=whole, channel=channel)
        if all_of_it
        else Recording(file, start, start + duration, whole, channel)
    )
    carried = ("gender", "age", "language", *manifest.METADATA_KEYS, *options.metadata)
    metadata = {key: str(fields[key]) for key in sorted(set(carried)) if fields.get(key)}
    return Utterance(id, user, text, split, audio, metadata)


def _user(fields: Mapping[str, Any], options: SourceOptions) -> str | None:
    """The speaker, who may be a number; None where there is none."""
    user = fields.get(options.user_key or "speaker")
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    return user if isinstance(user, str) and user.strip() else None


def _times(
    supervision: Mapping[str, Any], recording: Mapping[str, Any], cut: float, length: float | None
) -> tuple[float, float, float]:
    """(start in the recording, duration, the recording's duration) in seconds.

    Raises:
      KeyError, TypeError, ValueError: one is missing, no number, or impossible.
    """
    start, duration = _number(supervision, "start"), _number(supervision, "duration")
    whole = _number(recording, "duration")
    if length is not None and (start < -0.1 or start + duration > length + 0.1):
        raise ValueError("the supervision reaches out of its cut")
    if duration <= 0 or cut + start < -1e-6:
        raise ValueError(f"no such times: {cut + start} s for {duration} s")
    return max(0.0, cut + start), duration, whole


def _source(
    recording: Mapping[str, Any], channel: Any, folder: Path, options: SourceOptions
) -> tuple[str, int | None, tuple[str, str] | None]:
    """(file, which of its channels or None for its only one, (reason, detail) of what is wrong)."""
    if isinstance(channel, list):
        channel = channel[0] if len(channel) == 1 else None
    sources = recording.get("sources")
    if not isinstance(sources, list) or not isinstance(channel, int):
        return "", None, ("unsupported", "several channels, or no sources")
    for source in sources:
        if not isinstance(source, dict) or channel not in source.get("channels", [0]):
            continue
        name, kind = source.get("source"), source.get("type")
        channels = source.get("channels", [0])
        index = channels.index(channel) if len(channels) > 1 else None
        if not isinstance(name, str) or kind not in ("file", "command"):
            return "", None, ("unsupported", f"a source of type {kind!r}")
        if kind == "command":
            if not options.pipes:
                return "", None, ("pipe_refused", f"{name} (--pipes runs it)")
            return Command(name), index, None
        return find_file(folder, name), index, None
    return "", None, ("missing_audio", f"no source of channel {channel}")


def _number(fields: Mapping[str, Any], name: str) -> float:
    return manifest.as_number(name, fields[name])
