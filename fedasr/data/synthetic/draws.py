"""All chance in a synthetic corpus: a function of its seed and of what the draw is for."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedasr.data.synthetic.config import SyntheticConfig


def random_of(config: SyntheticConfig, *purpose: str) -> random.Random:
    """A stream of its own for every purpose."""
    # A string seed goes through SHA-512: the same stream in every process and Python version.
    return random.Random("/".join((str(config.seed), *purpose)))


def utterance_count(config: SyntheticConfig, user: str, split: str) -> int:
    """How many utterances a user has."""
    return random_of(config, user, "count").randint(*config.utterances(split))
