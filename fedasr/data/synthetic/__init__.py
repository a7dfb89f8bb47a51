"""The embedded default corpus: spoken English made on this machine by eSpeak NG.

Every user has a voice of its own (accent, pitch, vocal tract, rate, microphone tone) and a mix of
words or topics of its own. Two domains differ in accent and in voice: split "seed" (low voices,
General American and Received Pronunciation) and splits "train", "dev" and "test" (higher voices,
eight other accents). Task "fresh" has one domain of all voices; there the splits differ in words:
`FRESH_WORDS` are in all but "seed". All splits are disjoint in users and in sentences.

A recording is a pure function of (text, voice) for one version of eSpeak NG: bit for bit the same
in any process and after any other synthesis.
"""

from fedasr.data.synthetic.config import SyntheticConfig, tasks
from fedasr.data.synthetic.espeak import SAMPLE_RATE, synthesize
from fedasr.data.synthetic.preparation import prepare_synthetic
from fedasr.data.synthetic.sentences import (
    COMMON_FRESH_WORDS,
    FRESH_WORDS,
    RARE_FRESH_WORDS,
    SPLITS,
    sentence_split,
)
from fedasr.data.synthetic.speech import (
    expected_users,
    fingerprint,
    synthetic_utterances,
    total_utterances,
)
from fedasr.data.synthetic.voices import Voice, speaker_voice

__all__ = [
    "COMMON_FRESH_WORDS",
    "FRESH_WORDS",
    "RARE_FRESH_WORDS",
    "SAMPLE_RATE",
    "SPLITS",
    "SyntheticConfig",
    "Voice",
    "expected_users",
    "fingerprint",
    "prepare_synthetic",
    "sentence_split",
    "speaker_voice",
    "synthesize",
    "synthetic_utterances",
    "tasks",
    "total_utterances",
]
