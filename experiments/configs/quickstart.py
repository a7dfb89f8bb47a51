"""The recipe `quickstart` by its path in a clone: see `fedasr.recipes.quickstart`."""

from fedasr.recipes.quickstart import get_config

__all__ = ["get_config"]
