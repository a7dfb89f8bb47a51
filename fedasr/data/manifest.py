"""Manifests: JSON lines that point at recordings."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedasr.data.corpus import valid_split_name
from fedasr.data.prepare import Rejected, Utterance
from fedasr.data.recordings import read_audio
from fedasr.errors import UserError


def read_manifest(path: str | os.PathLike[str]) -> Iterator[Utterance | Rejected]:
    """Reads a manifest: one JSON object a line, blank lines aside.

    A line holds `audio_filepath` (absolute, or relative to the manifest's folder), `text` and
    `user`, and may hold `split` (see `fedasr.data.prepare.prepare`) and `id` (by default
    `audio_filepath`). Audio is whatever soundfile reads (WAV, FLAC, MP3, ...), at any sample rate
    and with any number of channels, and is read only when `audio()` is called. Other keys are
    ignored, except an `offset` other than 0 (an excerpt of a file), which is not supported.

    Args:
      path: the manifest, UTF-8.

    Yields:
      An `Utterance`, or for a line that cannot be used a `Rejected` ("bad_manifest_line").

    Raises:
      UserError: the manifest cannot be read or holds no line, or (from `audio()`) soundfile is
        missing.
    """
    path = Path(path)
    found = False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    found = True
                    yield _parse(line, f"line {number}", path.parent)
    except OSError as error:
        raise UserError(f"the manifest {path} cannot be read: {error.strerror}") from error
    if not found:
        raise UserError(f"the manifest {path} is empty: write one JSON object a line into it")


def manifest_fingerprint(path: str | os.PathLike[str]) -> tuple[str, int]:
    """A digest of a manifest and of the sizes and times of change of the audio it names.

    Returns:
      (digest, number of lines that are not blank).

    Raises:
      UserError: as `read_manifest`.
    """
    digest = hashlib.sha256()
    lines = 0
    for item in read_manifest(path):
        lines += 1
        state: list[Any]
        if isinstance(item, Rejected):
            state = [item.id, item.detail]
        else:
            file = item.audio.args[0]
            try:
                stat = os.stat(file)
                state = [stat.st_size, stat.st_mtime_ns]
            except (OSError, ValueError):
                state = []
            state += [item.id, item.user, item.text, item.split, os.fspath(file)]
        digest.update(json.dumps(state).encode())
    return digest.hexdigest(), lines


def _parse(line: bytes, where: str, folder: Path) -> Utterance | Rejected:
    def rejected(detail: str) -> Rejected:
        return Rejected(where, "bad_manifest_line", detail)

    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return rejected(f"not JSON: {error}")
    if not isinstance(entry, dict):
        return rejected("not a JSON object")
    if isinstance(entry.get("user"), int) and not isinstance(entry["user"], bool):
        entry["user"] = str(entry["user"])
    for key in ("audio_filepath", "text", "user"):
        if not isinstance(entry.get(key), str):
            return rejected(f"{key} is missing or not a string")
        if key != "text" and not entry[key].strip():
            return rejected(f"{key} is empty")
    for key in ("split", "id"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            return rejected(f"{key} is not a string")
    split = entry.get("split")
    if split is not None and not valid_split_name(split):
        return rejected(f"{split!r} cannot be the name of a split")
    if entry.get("offset"):
        return rejected("offset is not supported: cut the audio into files")
    return Utterance(
        id=entry.get("id") or entry["audio_filepath"],
        user=entry["user"],
        text=entry["text"],
        split=split,
        audio=functools.partial(read_audio, folder / entry["audio_filepath"]),
    )
