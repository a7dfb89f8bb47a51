"""Recognisers that others trained: read from a folder as Hugging Face's libraries write it.

A family of models is a module here with a `Family`, and one line in `FAMILIES`. All hear audio: see
`audio` for what a batch holds.
"""

from fedasr.models.pretrained import parakeet, wav2vec2, whisper
from fedasr.models.pretrained.family import Family

FAMILIES: dict[str, Family] = {
    "parakeet": parakeet.FAMILY,
    "wav2vec2": wav2vec2.FAMILY,
    "whisper": whisper.FAMILY,
}
