"""The recipe `mini` by its path in a clone: see `fedasr.recipes.mini`."""

from fedasr.recipes.mini import get_config

__all__ = ["get_config"]
