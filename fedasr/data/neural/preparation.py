"""Neural recordings as a corpus on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedasr import text as text_lib
from fedasr.data.neural.sessions import NeuralSessions
from fedasr.data.preparation.conversion import Converted, Skip, check_feasible, labels_of
from fedasr.data.preparation.prepare import prepare_with
from fedasr.data.utterances import Progress, Utterance
from fedasr.errors import UserError

CHANNELS_FILE = "channels.json"
LABELS = ("characters", "phonemes", "handwriting")
# The split whose texts were withheld: its sentences are kept, to be decoded into a submission.
WITHHELD = "competitionHoldOut"


@dataclass(frozen=True)
class NeuralConverter:
    """Turns a sentence into what a corpus stores, as `preparation.conversion.Converter` does.

    channels: of every sentence. stride: bins per output frame of the model. min_bins: shorter
    sentences are left out. language, keep_letters: of the texts. lexicon: a pronouncing dictionary
    (see `fedasr.text.read_lexicon`) to write phonemes instead of letters, or "". lexicon_digest:
    of that file. labels: one of `LABELS`, "" for phonemes where there is a lexicon, else
    characters. g2p, final_silence: see
    `fedasr.text.sentence_phonemes`.
    """

    channels: int
    stride: int = 4
    min_bins: int = 8
    language: str = "en"
    keep_letters: bool = False
    pad_space: bool = False
    lexicon: str = ""
    lexicon_digest: str = ""
    store: str = "features"
    labels: str = ""
    g2p: bool = False
    final_silence: bool = False

    @property
    def characters(self) -> str | list[str]:
        """The alphabet of the labels."""
        if self._phonemes:
            return text_lib.PhonemeTokenizer().characters
        if self.labels == "handwriting":
            return text_lib.HANDWRITING
        return text_lib.alphabet(self.language, self.keep_letters)

    @property
    def _phonemes(self) -> bool:
        return self.labels == "phonemes" or bool(self.lexicon and not self.labels)

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape of the stored signal after axis 0."""
        return (self.channels,)

    @property
    def dtype(self) -> type:
        """Of the stored signal."""
        return np.float32

    def __call__(self, utterance: Utterance) -> Converted:
        """Converts one sentence.

        Raises:
          Skip: it cannot be used.
          UserError: no sentence can be, such as for want of a package.
        """
        withheld = utterance.split == WITHHELD and not utterance.text.strip()
        labels = np.zeros(0, np.int32) if withheld else self._labels(utterance.text)
        signal, rate = utterance.audio()
        if len(signal) < self.min_bins:
            raise Skip("too_short", f"{len(signal)} bins, at least {self.min_bins}")
        check_feasible(labels, len(signal), self.stride)
        return Converted(signal.astype(np.float32), labels, len(signal) / rate, False)

    def _labels(self, text: str) -> np.ndarray:
        """Of a sentence, int32 [labels]."""
        if self.labels == "handwriting":
            found = text_lib.handwriting_text(text)
            if found.losses:
                raise Skip("unknown_characters", text_lib.describe_losses(found.losses, text))
            if not found.text:
                raise Skip("empty_text", repr(text))
            return text_lib.CharTokenizer(text_lib.HANDWRITING).encode(found.text, self.pad_space)
        letters = text_lib.alphabet(self.language, self.keep_letters)
        labels = labels_of(text, self.language, text_lib.CharTokenizer(letters), self.pad_space)
        if not self._phonemes:
            return labels
        words, _ = text_lib.normalize_text(text, self.language, self.keep_letters)
        known = _lexicon(self.lexicon, self.lexicon_digest) if self.lexicon else None
        phonemes, unknown = text_lib.sentence_phonemes(words, known, self.g2p, self.final_silence)
        if unknown:
            raise Skip("unknown_words", f"{unknown} in {text!r}")
        return text_lib.PhonemeTokenizer().encode(phonemes, self.pad_space)


@functools.lru_cache(maxsize=1)
def _lexicon(path: str, digest: str) -> dict[str, list[tuple[str, ...]]]:
    del digest  # a file that has changed is read again
    return text_lib.read_lexicon(path)


def _digest(lexicon: str | os.PathLike[str]) -> str:
    """Names the contents of a dictionary. Raises UserError if it is none."""
    text_lib.read_lexicon(lexicon)
    return hashlib.sha256(Path(lexicon).read_bytes()).hexdigest()[:16]


def prepare_sessions(
    source: NeuralSessions,
    out: str | os.PathLike[str],
    *,
    stride: int = 4,
    language: str = "en",
    keep_letters: bool = False,
    pad_space: bool = False,
    lexicon: str | os.PathLike[str] | None = None,
    labels: str = "",
    g2p: bool = False,
    final_silence: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes recordings as a corpus whose users are days; what is wrong is counted.

    The corpus gives "features" float32 [bins, channels], z-scored, and "labels" int32.
    Which channels were set to zero is listed in `channels.json` of the folder, if any were.

    Args:
      source: what to read. stride: bins per output frame of the model, all its steps together.
      lexicon: a pronouncing dictionary, for labels that are phonemes; sentences with a word that it
        does not have are skipped ("unknown_words").
      labels: one of `LABELS`; "" for phonemes where there is a lexicon, else characters. Phonemes
        without a lexicon are g2p_en's.
      g2p: words that the lexicon does not have are pronounced by g2p_en (extra `g2p`).
      final_silence: silence after the last word, too, as in the published labels.
      out, language, keep_letters, pad_space, workers, progress, overwrite: see
        `fedasr.data.preparation.prepare.prepare`.

    Returns:
      See `fedasr.data.preparation.prepare.prepare`; "notes" counts channels set to zero
      (`NeuralSessions`).
    """
    if stride < 1:
        raise UserError(f"stride must be at least 1, not {stride}")
    usual = "phonemes" if lexicon else "characters"
    named = labels or usual
    if named not in LABELS:
        raise UserError(f"labels={labels!r} must be one of {', '.join(LABELS)}")
    if named != "phonemes" and (lexicon or g2p or final_silence):
        raise UserError("lexicon, g2p and final_silence are for labels that are phonemes")
    converter = NeuralConverter(
        channels=source.channels,
        stride=stride,
        language=language,
        keep_letters=keep_letters,
        pad_space=pad_space,
        lexicon=os.fspath(lexicon or ""),
        lexicon_digest=_digest(lexicon) if lexicon else "",
        # As older releases named it, whose folders are to go on.
        labels="" if named == usual else named,
        g2p=g2p or (named == "phonemes" and not lexicon),
        final_silence=final_silence,
    )

    def write_broken(folder: Path) -> None:
        if source.broken:
            text = json.dumps(source.broken, indent=1)
            (folder / CHANNELS_FILE).write_text(text, encoding="utf-8")

    return prepare_with(
        converter,
        source,
        out,
        name=source.name,
        fingerprint=source.fingerprint,
        workers=workers,
        notes=source.notes,
        total=source.total,
        progress=progress,
        overwrite=overwrite,
        write_more=write_broken,
    )
