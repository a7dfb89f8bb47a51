"""The recipe `mini_algorithms` by its path in a clone: see `fedasr.recipes.mini_algorithms`."""

from fedasr.recipes.mini_algorithms import get_config

__all__ = ["get_config"]
