"""Recognisers that others trained: read from a folder as Hugging Face's libraries write it.

A family of models is a module here with a `Family`, and one line in `registry.FAMILIES`. All hear
audio: see `audio` for what a batch holds.
"""

from fedasr.models.pretrained.exports import export_folder
from fedasr.models.pretrained.registry import FAMILIES

__all__ = ["FAMILIES", "export_folder"]
