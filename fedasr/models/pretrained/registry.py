"""The families by name: that of the model in a configuration."""

from fedasr.models.pretrained import parakeet, wav2vec2, whisper
from fedasr.models.pretrained.family import Family

FAMILIES: dict[str, Family] = {
    "parakeet": parakeet.FAMILY,
    "wav2vec2": wav2vec2.FAMILY,
    "whisper": whisper.FAMILY,
}
