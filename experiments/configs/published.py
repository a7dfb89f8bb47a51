"""The published tables by their path in a clone: see `fedasr.recipes.published`."""

from fedasr.recipes.published import TABLES

__all__ = ["TABLES"]
