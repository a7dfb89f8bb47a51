"""One recording with its transcript, as sources give it and a preparation takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Utterance:
    """One recording with its transcript.

    Attributes:
      id: unique within the corpus.
      user: who speaks; privacy and federated learning are per user.
      text: transcript as written; `fedasr.text` normalises it.
      split: the split it belongs to, or None to leave the choice to `prepare`.
      audio: returns (samples float32 [samples] or [samples, channels] in [-1, 1], rate in Hz), and
        perhaps how many complaints of a decoder were caught. To be called in another process it
        must be picklable. Recordings are compared with one another where it is a
        `fedasr.data.recordings.Recording`.
      metadata: what else the source knows of it (age, gender, accent, device ...), for reports.
    """

    id: str
    user: str
    text: str
    split: str | None
    audio: Callable[[], tuple[Any, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """An input that its source could not turn into an utterance; `prepare` counts it.

    Attributes:
      id: where it came from.
      reason: the count it belongs to.
      detail: one line for people.
    """

    id: str
    reason: str
    detail: str
