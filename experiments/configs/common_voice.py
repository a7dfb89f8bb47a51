"""The recipe `common_voice` by its path in a clone: see `fedasr.recipes.common_voice`."""

from fedasr.recipes.common_voice import get_config

__all__ = ["get_config"]
