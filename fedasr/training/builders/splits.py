"""Splits that a configuration names and the data has."""

from collections.abc import Callable, Collection
from typing import Any

from fedasr.data.records import has_split
from fedasr.data.splits import ALIASES
from fedasr.errors import UserError
from fedasr.training.config import Config

# Splits of the corpora that there are programs for: one of these that a corpus lacks is left out
# with a word (configurations name all that a corpus usually has); any other name is a slip.
KNOWN_SPLITS = frozenset(
    """
    seed train dev test competitionHoldOut train_clean_100 train_clean_360 train_other_500
    dev_clean dev_other test_clean test_other
    """.split()
) | frozenset(ALIASES)


def check_splits(
    config: Config, splits: Collection[str], where: Any, log: Callable[[str], None]
) -> None:
    """Raises UserError for a split that the data lacks and no corpus is known to have.

    Args:
      config: of the run.
      splits: that the data has.
      where: it is, for messages.
      log: is told what is left out instead.
    """
    stored = {"splits": dict.fromkeys(splits)}
    evaluated = config.data.eval
    wanted = {
        "data.train": [config.data.train],
        "data.eval": evaluated,
        "evaluation.while_training": config.evaluation.while_training,
        "seed_training.split": [config.seed_training.split],
    }
    for field, names in wanted.items():
        for name in names:
            if not has_split(stored, name) and name not in KNOWN_SPLITS:
                raise UserError(
                    f"{field}: there is no split {name!r} in {where}: choose of {', '.join(splits)}"
                )
    for name in config.evaluation.while_training:
        if evaluated and name not in evaluated and has_split(stored, name):
            log(f"evaluation.while_training: {name!r} is not in data.eval and is not evaluated")
