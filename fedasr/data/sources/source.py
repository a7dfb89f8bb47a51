"""What a source of utterances is, and what a person may say of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedasr.data.identity import file_state
from fedasr.data.recordings import Recording
from fedasr.data.utterances import Rejected, Utterance


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
