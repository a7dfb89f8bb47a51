"""The recipe `librispeech` by its path in a clone: see `fedasr.recipes.librispeech`."""

from fedasr.recipes.librispeech import get_config

__all__ = ["get_config"]
