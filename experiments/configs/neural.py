"""The recipe `neural` by its path in a clone: see `fedasr.recipes.neural`."""

from fedasr.recipes.neural import get_config

__all__ = ["get_config"]
