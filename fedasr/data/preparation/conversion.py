"""From an utterance to what a corpus stores of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from fedasr import text as text_lib
from fedasr.data import identity
from fedasr.data.recordings import Mismatch, Recording, log_mel_on_cpu
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError

if TYPE_CHECKING:
    from fedasr.audio.features import LogMelConfig


STORES = ("features", "audio")


class Skip(Exception):
    """Leaves one utterance out: (reason, detail)."""


class Converted(NamedTuple):
    """What is stored of one utterance.

    signal: features float16 [frames, mels] or audio int16 [samples]. labels: int32 [characters].
    seconds: of the recording. saturated: whether samples beyond [-1, 1] were cut to int16.
    recording: identifies what was decoded; None where the source is no recording. complaints: of
    the decoder.
    """

    signal: np.ndarray
    labels: np.ndarray
    seconds: float
    saturated: bool
    recording: str | None = None
    complaints: int = 0


class Conversion(Protocol):
    """Turns utterances into what is stored: a data class that can be pickled.

    store: name of the stored signal. characters: alphabet of the labels. trailing, dtype: of the
    stored signal, the shape without axis 0. Its call raises `Skip` for what cannot be used.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def store(self) -> str: ...
    @property
    def characters(self) -> str | list[str]: ...
    @property
    def trailing(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> type: ...
    def __call__(self, utterance: Utterance) -> Converted: ...


@dataclass(frozen=True)
class Converter:
    """Computes what is stored; fields: arguments of `fedasr.data.preparation.prepare.prepare`."""

    features: LogMelConfig
    language: str
    keep_letters: bool
    store: str
    pad_space: bool
    stride: int
    min_frames: int
    max_seconds: float
    alphabet: str = ""
    subwords: Mapping[str, str] | None = None
    learned: bool = False
    rules: str = ""

    @property
    def characters(self) -> str | list[str]:
        """The alphabet of the labels, or the pieces of a subword tokenizer."""
        return self._tokenizer.characters

    @property
    def _tokenizer(self) -> text_lib.Tokenizer:
        if self.subwords:
            return text_lib.subwords_of(self.subwords)
        characters = self.alphabet or text_lib.alphabet(self.language, self.keep_letters)
        return text_lib.CharTokenizer(characters)

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape of the stored signal after axis 0."""
        return (self.features.num_mels,) if self.store == "features" else ()

    @property
    def dtype(self) -> type:
        """Of the stored signal."""
        return np.float16 if self.store == "features" else np.int16

    def __call__(self, utterance: Utterance) -> Converted:
        """Converts one utterance.

        Raises:
          Skip: it cannot be used.
          UserError: no utterance can be, such as for want of a package.
        """
        from fedasr.audio import features as features_lib

        labels = labels_of(
            utterance.text, self.language, self._tokenizer, self.pad_space, self.rules
        )
        audio, rate, complaints = _decoded(utterance)
        if not rate > 0:
            raise Skip("unreadable_audio", f"a sample rate of {rate}")
        if not audio.size:
            raise Skip("unreadable_audio", "no samples")
        seconds = len(audio) / rate
        # What is reported must be of all of a test set: the limit is for what is trained on.
        if seconds > self.max_seconds and not (utterance.split or "").startswith(("dev", "test")):
            raise Skip("too_long", f"{seconds:.2f} s, at most {self.max_seconds} s")
        if not np.isfinite(audio).all():
            raise Skip("non_finite_audio", "NaN or Inf samples")
        waveform = features_lib.to_mono_16k(audio, rate, self.features)
        frames = features_lib.num_frames(len(waveform), self.features)
        if frames < self.min_frames:
            raise Skip("too_short", f"{frames} frames, at least {self.min_frames}")
        check_feasible(labels, frames, self.stride)
        recording = None
        if isinstance(utterance.audio, Recording):
            recording = identity.recording_digest(audio, rate)
        if self.store == "audio":
            if not np.isfinite(waveform).all():
                raise Skip("non_finite_audio", "the samples overflow")
            scaled = np.round(waveform * np.float32(features_lib.INT16_SCALE))
            cut = np.clip(scaled, -32768, 32767)
            saturated = bool((np.abs(waveform) > 1).any())
            signal = cut.astype(np.int16)
            return Converted(signal, labels, seconds, saturated, recording, complaints)
        features = log_mel_on_cpu(waveform, self.features)
        if not np.isfinite(features).all():  # finite samples, but absurdly large ones
            raise Skip("non_finite_audio", "the features overflow")
        signal = features.astype(np.float16)
        return Converted(signal, labels, seconds, False, recording, complaints)


# How transcripts are written: words as they are said, or as published (`text.published_text`).
RULES = ("", "published")


def labels_of(
    text: str, language: str, tokenizer: text_lib.Tokenizer, pad_space: bool, rules: str = ""
) -> np.ndarray:
    """The ids of a transcript, int32 [tokens], written by one of `RULES`.

    Raises:
      Skip: "unknown_characters" or "empty_text".
    """
    # A subword tokenizer's pieces are no alphabet; the characters in them are.
    characters: Any = getattr(tokenizer, "alphabet", tokenizer.characters)
    if rules:
        found = text_lib.Normalised(text_lib.published_text(text), ())
    else:
        found = text_lib.normalise(text, language, characters)
    if found.losses:
        raise Skip("unknown_characters", text_lib.describe_losses(found.losses, text))
    if not found.text:
        raise Skip("empty_text", repr(text))
    try:
        return np.asarray(tokenizer.encode(found.text, pad_space=pad_space), np.int32)
    except UserError as error:  # pieces that cannot write this text
        raise Skip("unwritable_text", str(error)) from error


def check_feasible(labels: np.ndarray, frames: int, stride: int) -> None:
    """Raises Skip("infeasible") where CTC cannot align the labels with ceil(frames / stride)."""
    needed = len(labels) + int(np.count_nonzero(labels[1:] == labels[:-1]))
    if needed > (there := -(-frames // stride)):
        raise Skip("infeasible", f"{needed} output frames needed, {there} there")


def _decoded(utterance: Utterance) -> tuple[np.ndarray, int, int]:
    """(samples, rate, complaints of the decoder)."""
    try:
        audio, rate, *more = utterance.audio()
    except (UserError, MemoryError):
        raise
    except Mismatch as error:
        raise Skip("duration_mismatch", str(error)) from error
    except ValueError as error:  # says itself what is wrong
        raise Skip("unreadable_audio", str(error)) from error
    except Exception as error:
        raise Skip("unreadable_audio", f"{type(error).__name__}: {error}") from error
    return np.asarray(audio), rate, sum(more)
