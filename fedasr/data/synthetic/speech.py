"""The utterances of a synthetic corpus: who says what, in which voice."""

import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Iterator

import numpy as np

from fedasr.data import splits
from fedasr.data.synthetic import draws
from fedasr.data.synthetic.config import SyntheticConfig, users_of
from fedasr.data.synthetic.espeak import audio_of, engine, require_soxr
from fedasr.data.synthetic.sentences import SPLITS, sentences_of
from fedasr.data.synthetic.voices import MIDDLE, speaker_voice, vary
from fedasr.data.utterances import Utterance

# Raised by hand whenever the same config would give other sentences, voices or samples.
_GENERATOR_VERSION = 1


def expected_users(config: SyntheticConfig, split: str) -> int:
    """Number of users of a split, or of a part of splits (see `fedasr.data.splits`); no engine.

    Raises:
      UserError: it is no split.
    """
    users: dict[str, list[str]] = {name: [] for name in SPLITS if config.users(name)}
    for user, name in users_of(config):
        users[name].append(user)

    def open_split(name):
        sizes = [draws.utterance_count(config, user, name) for user in users[name]]
        return types.SimpleNamespace(users=users[name], sizes=np.array(sizes))

    return len(splits.resolve(split, list(users), open_split, "the synthetic corpus").users)


def total_utterances(config: SyntheticConfig) -> int:
    """Number of utterances that `synthetic_utterances(config)` yields; needs no engine."""
    return sum(draws.utterance_count(config, user, split) for user, split in users_of(config))


def fingerprint(config: SyntheticConfig) -> str:
    """Hexadecimal name of the corpus: covers the config, the generator and the engine's version.

    Raises:
      UserError: if eSpeak NG is not installed.
    """
    described = dataclasses.asdict(config) | {
        "generator": _GENERATOR_VERSION,
        "engine": engine().version,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def synthetic_utterances(config: SyntheticConfig) -> Iterator[Utterance]:
    """Yields the corpus user by user, in the order of `SPLITS`.

    Nothing is synthesised until an utterance's `audio()` is called, which gives float32 [samples]
    in [-1, 1] at 16 kHz. `audio` can be pickled and called in any process and any order.

    Raises:
      UserError: at once, if eSpeak NG or soxr is not installed.
    """
    require_soxr()
    engine()
    return _utterances(config)


def _utterances(config: SyntheticConfig) -> Iterator[Utterance]:
    for user, split in users_of(config):
        voice = speaker_voice(config, user)
        said = {"accent": voice.accent, "pitch": "high" if voice.pitch[0] >= MIDDLE else "low"}
        for index, text in enumerate(sentences_of(config, user, split)):
            name = f"{user}-{index:04d}"
            spoken = vary(voice, draws.random_of(config, name))
            audio = functools.partial(audio_of, text, spoken)
            yield Utterance(name, user, text, split, audio, said)
