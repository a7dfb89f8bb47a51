"""The recipe `phone` by its path in a clone: see `fedasr.recipes.phone`."""

from fedasr.recipes.phone import get_config

__all__ = ["get_config"]
