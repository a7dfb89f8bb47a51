"""The recipe `own_speech` by its path in a clone: see `fedasr.recipes.own_speech`."""

from fedasr.recipes.own_speech import get_config

__all__ = ["get_config"]
