"""The recipe `large_asr` by its path in a clone: see `fedasr.recipes.large_asr`."""

from fedasr.recipes.large_asr import get_config

__all__ = ["get_config"]
