"""The recipe `adapted` by its path in a clone: see `fedasr.recipes.adapted`."""

from fedasr.recipes.adapted import get_config

__all__ = ["get_config"]
