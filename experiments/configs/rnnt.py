"""The recipe `rnnt` by its path in a clone: see `fedasr.recipes.rnnt`."""

from fedasr.recipes.rnnt import get_config

__all__ = ["get_config"]
