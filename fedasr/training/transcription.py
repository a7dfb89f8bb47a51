"""What a trained recogniser writes of recordings that nobody has prepared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.audio import features
from fedasr.data import windows
from fedasr.data.recordings import log_mel_on_cpu
from fedasr.data.records import read_metadata as read_corpus_metadata
from fedasr.data.windows import Window
from fedasr.decoding.alignment import Word, words_of
from fedasr.decoding.registry import Decoder, make_decoder
from fedasr.errors import UserError
from fedasr.models.pretrained import FAMILIES
from fedasr.models.pretrained.whisper_model import CROSS_ENTROPY
from fedasr.models.recogniser import Recogniser, takes_audio
from fedasr.text import PHONEMES, SILENCE, CharTokenizer, Tokenizer
from fedasr.training.builders import decoders, models
from fedasr.training.builders.corpora import fitting_tokenizer
from fedasr.training.checkpoint import read_metadata, restore_params
from fedasr.training.config import Config
from fedasr.training.remote import copies
from fedasr.training.sections import Decoding
from fedasr.training.workdir import recorded_config

_SMALLEST = 192  # frames, of what recordings are padded to
_LABELS = 4  # of the empty transcripts that the loss is given


class Transcript(NamedTuple):
    """text: words with a space between. words: with their times. seconds: of the recording."""

    text: str
    words: tuple[Word, ...]
    seconds: float


class Transcriber:
    """A recogniser with its parameters and what decodes its scores.

    A recording of up to `longest` seconds is computed whole, as `fedasr evaluate` does; what is
    longer in parts that are cut where it is quiet (`fedasr.data.windows`), so that the memory of
    the device is bounded by `longest`, and of files that of the host, too.

    Args:
      recogniser, params: of the model.
      tokenizer: that wrote its labels.
      decoder: of the scores; None for greedy decoding.
      mel: parameters of the features. store: "features", or "audio" where the model was trained on
        features of audio that was stored as int16.
      takes_audio: whether it hears audio itself, in blocks of 10 ms (`fedasr.models.pretrained`).
      longest: seconds of a part.

    Raises:
      UserError: a decoder for a model that has no scores of tokens in each frame.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        params: Any,
        tokenizer: Tokenizer,
        decoder: Decoder | None = None,
        *,
        mel: features.LogMelConfig = features.LogMelConfig(),
        store: str = "features",
        takes_audio: bool = False,
        longest: float = windows.LONGEST,
    ) -> None:
        if recogniser.scores is None and decoder is not None:
            raise UserError(
                "this model has no scores that a beam could search (objective 'rnnt'): choose the "
                "decoder 'greedy'"
            )
        if not 1 <= longest <= 3600:
            raise UserError(f"longest={longest} must be seconds from 1 to 3600")
        self.tokenizer, self.longest = tokenizer, longest
        self._decoder = decoder or make_decoder("greedy", tokenizer)
        self._mel, self._store, self._takes_audio = mel, store, takes_audio
        self._params = jax.device_put(params)
        compute: Any = recogniser.evaluate if recogniser.scores is None else recogniser.scores
        self._has_scores = recogniser.scores is not None
        # The rest of what it returns is not computed.
        self._compute: Any = jax.jit(lambda params, batch: compute(params, batch)[:2])

    def transcribe(
        self, audio: str | os.PathLike[str] | bytes | np.ndarray, rate: int = windows.RATE
    ) -> Transcript:
        """The text of one recording.

        Args:
          audio: a path, the content of a file, or samples: floating point [samples] or [samples,
            channels] in [-1, 1].
          rate: of samples, in Hz.

        Raises:
          UserError: it cannot be read, in one line.
        """
        if isinstance(audio, np.ndarray):
            blocks: Iterator[np.ndarray] = iter([features.to_mono_16k(audio, rate, self._mel)])
        else:
            blocks = windows.read_blocks(audio)
        texts, words, seconds = [], [], 0.0
        # Tokens without times could not be told from those of the context.
        context = windows.CONTEXT if self._has_scores else 0.0
        for window in windows.windows(blocks, self.longest, context):
            text, found = self._window(window)
            texts.append(text)
            words += found
            seconds = window.start + (window.last - window.first) / windows.RATE
        return Transcript(" ".join(filter(None, texts)), tuple(words), round(seconds, 3))

    def transcribe_all(
        self, files: Iterable[str | os.PathLike[str] | bytes]
    ) -> Iterator[Transcript | UserError]:
        """Each recording's text, in order; or why there is none."""
        for file in files:
            try:
                yield self.transcribe(file)
            except UserError as error:
                yield error

    def _window(self, window: Window) -> tuple[str, list[Word]]:
        """Text and words of a part, without those of its context."""
        batch, duration = self._heard(window.samples)
        if batch is None:
            return "", []
        out, lengths = self._compute(self._params, batch)
        outputs, length = np.asarray(out)[0], int(lengths[0])
        if not self._has_scores:  # tokens, of all of the part
            text = self.tokenizer.decode(outputs[:length])
            return text, [Word(word, None, None) for word in text.split()]
        seconds = duration / max(length, 1)
        kept = slice(0, length)
        if window.first or window.last < len(window.samples):
            ends = (np.array([window.first, window.last]) / windows.RATE / seconds).round()
            last = length if window.last == len(window.samples) else int(ends[1])
            kept = slice(int(ends[0]), min(last, length))
        log_probs = outputs[kept]
        text = self._decoder(log_probs)
        return text, words_of(text, log_probs, self.tokenizer, seconds, window.start)

    def _heard(self, samples: np.ndarray) -> tuple[dict[str, jax.Array] | None, float]:
        """What evaluation would see of samples, None of too few; and the seconds that it spans."""
        hop, rate = self._mel.hop_samples, self._mel.sample_rate
        stored = np.clip(np.round(samples * np.float32(features.INT16_SCALE)), -32768, 32767)
        if self._takes_audio:
            blocks = np.zeros((-(-len(samples) // hop), hop), np.int16)
            blocks.reshape(-1)[: len(samples)] = stored
            if len(samples) < self._mel.frame_samples:
                return None, 0.0
            more = {"samples": jnp.full(1, len(samples), jnp.int32)}
            return _batch(blocks) | more, len(samples) / rate
        if self._store == "audio":
            samples = stored.astype(np.float32) / np.float32(features.INT16_SCALE)
        found = log_mel_on_cpu(samples, self._mel).astype(np.float16)
        return (_batch(found) if len(found) else None), len(found) * hop / rate


def _batch(found: np.ndarray) -> dict[str, jax.Array]:
    """A batch of one utterance without a transcript, padded to one of a few lengths."""
    frames = _SMALLEST
    while frames < len(found):
        frames = frames * 3 // 2 if frames * 3 // 2 >= len(found) else frames * 2
    padded = np.zeros((1, frames, found.shape[1]), found.dtype)
    padded[0, : len(found)] = found
    return {
        "features": jnp.asarray(padded),
        "features_length": jnp.full(1, len(found), jnp.int32),
        "labels": jnp.zeros((1, _LABELS), jnp.int32),
        "labels_length": jnp.zeros(1, jnp.int32),
        "mask": jnp.ones(1, bool),
    }


def load(
    path: str | Path,
    *,
    decoding: Decoding | Mapping[str, Any] | None = None,
    data: str | os.PathLike[str] | None = None,
    longest: float = windows.LONGEST,
) -> Transcriber:
    """A trained recogniser that transcribes.

    Users' own parameters (`local.patterns`), if the run had any, are not used: the model's are.

    Args:
      path: a work directory (its last checkpoint, or the best where that is kept), one checkpoint's
        folder, or a folder of `fedasr export`.
      decoding: how texts are found: settings in place of the run's, such as {"name": "beam", "lm":
        "words.arpa"}.
      data: the prepared corpus, for a language model or lexicon that is made from it; default the
        run's. Subword tokenizers and the form of the features are read there, too.
      longest: see `Transcriber`.

    Raises:
      UserError: there is no such model, or something that it needs is missing.
    """
    copies.refresh()
    metadata = read_metadata(path)
    config = recorded_config(metadata.get("config", {}))
    settings = config.decoding
    if isinstance(decoding, Decoding):
        settings = decoding
    elif decoding is not None:
        try:
            settings = dataclasses.replace(settings, **decoding)
        except TypeError as error:
            raise UserError(f"decoding: {error}") from error
    if config.model.name == "recurrent":
        raise UserError("a decoder of neural recordings transcribes no audio")
    directory = _directory(config, data)
    corpus = {} if directory is None else read_corpus_metadata(directory)
    tokenizer = _tokenizer(config, metadata, corpus)
    needs = [x for x in (settings.lm, settings.lexicon) if x.startswith(decoders.FROM)]
    if needs and directory is None:
        raise UserError(f"{needs[0]} is made from the prepared data, which is not there: give data")
    decoder = decoders.make_run_decoder(settings, directory or "", tokenizer, [])
    options = corpus.get("options", {})
    return Transcriber(
        models.build_recogniser(config),
        restore_params(path),
        tokenizer,
        decoder,
        mel=features.LogMelConfig(**options.get("features", {})),
        store=options.get("store", "features"),
        takes_audio=takes_audio(config.model.name),
        longest=_bounded(config, longest),
    )


def _bounded(config: Config, longest: float) -> float:
    """Seconds of a part, of which Whisper hears no more than its window, context included."""
    if config.model.name != "whisper":
        return longest
    heard = FAMILIES["whisper"].config(**config.model.options)
    room = 0.0 if heard.objective == CROSS_ENTROPY else 2 * windows.CONTEXT
    return min(longest, max(heard.samples / windows.RATE - room, 1.0))


def _directory(config: Config, data: str | os.PathLike[str] | None) -> Path | None:
    """The prepared corpus, if one is named or still where the run found it."""
    if data is not None:
        return Path(data)
    found = Path(config.data.dir) if config.data.dir else None
    return found if found is not None and found.exists() else None


def _tokenizer(config: Config, metadata: Mapping[str, Any], corpus: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint: what it carries itself, or that of its prepared data."""
    characters: Any = config.data.characters
    if carried := metadata.get("alphabet"):
        return fitting_tokenizer(config, {"options": carried})
    if corpus:
        return fitting_tokenizer(config, corpus)
    if characters is None:
        return CharTokenizer()
    if not isinstance(characters, str) and list(characters) != [*PHONEMES, SILENCE]:
        raise UserError(
            "the model writes subwords, and the prepared data that has their tokenizer is not "
            "there: give data"
        )
    return fitting_tokenizer(config, {"options": {"characters": characters}})
