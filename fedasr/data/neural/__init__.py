"""Neural recordings of attempted speech or handwriting: recording days are the users of a corpus.

Three layouts are read: that of the competition of Willett et al.
(`fedasr.data.neural.competition`), the TFRecord files of CORP's release
(`fedasr.data.neural.tfrecords`), and a manifest of arrays for recordings in any other form
(`fedasr.data.neural.arrays`).

But for CORP's, which says itself how, features are z-scored by whole block over the sentences of
one split: no label is used, but a sentence's scale depends on later ones of its block, which an
online decoder would not have. Noise
of training must come before smoothing, so smoothing, subsampling and windows are the model's
(`fedasr.models.recurrent`).
"""

from fedasr.data.neural.areas import SPEECH_AREAS, Area, parse_areas
from fedasr.data.neural.competition import SPLITS, Sentence, read_day
from fedasr.data.neural.preparation import (
    CHANNELS_FILE,
    LABELS,
    WITHHELD,
    NeuralConverter,
    prepare_sessions,
)
from fedasr.data.neural.scores import BlockReport, z_score_block
from fedasr.data.neural.sessions import BIN_SECONDS, MAX_BROKEN, NeuralSessions

__all__ = [
    "BIN_SECONDS",
    "CHANNELS_FILE",
    "LABELS",
    "MAX_BROKEN",
    "SPEECH_AREAS",
    "SPLITS",
    "WITHHELD",
    "Area",
    "BlockReport",
    "NeuralConverter",
    "NeuralSessions",
    "Sentence",
    "parse_areas",
    "prepare_sessions",
    "read_day",
    "z_score_block",
]
