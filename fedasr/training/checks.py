"""What has to fit together before anything is trained: fields with each other, and with the data.

Each field by itself is checked by `fedasr.training.config.check_fields`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from fedasr.data.corpus import has_split
from fedasr.data.splits import ALIASES
from fedasr.errors import UserError
from fedasr.federated.server import make_optimizer

# Splits of the corpora that there are programs for: one of these that a corpus lacks is left out
# with a word (configurations name all that a corpus usually has); any other name is a slip.
KNOWN_SPLITS = frozenset(
    """
    seed train dev test competitionHoldOut train_clean_100 train_clean_360 train_other_500
    dev_clean dev_other test_clean test_other
    """.split()
) | frozenset(ALIASES)
# (least, most) of what optax's optimisers take; what is not here has to be 0 or more.
_OPTION_RANGES = {"eta": (0, 1e3), "trust_coefficient": (0, 1e3), "eps": (0, 1.0)}
_BELOW_ONE = ("b1", "b2", "momentum", "decay", "nu")


def check_optimizer(name: str, options: Mapping[str, Any], where: str) -> None:
    """Raises UserError for an optimiser that is unknown or does not take its options' values.

    Args:
      name, options: see `fedasr.federated.server.make_optimizer`.
      where: the options' field, for messages.
    """
    for option, value in options.items():
        least, most = _OPTION_RANGES.get(option, (0, 1e6))
        if isinstance(value, bool | str):
            continue
        if not least <= value <= most or (option in _BELOW_ONE and value >= 1):
            most_text = "below 1" if option in _BELOW_ONE else f"at most {most:g}"
            raise UserError(f"{where}.{option}={value} must be at least {least} and {most_text}")
    # Some options show what they are good for only when the optimiser is used.
    try:
        optimizer = make_optimizer(name, 0.1, **options)

        def once(x):
            return optimizer.update(x, optimizer.init(x), x)

        jax.eval_shape(once, {"x": jax.ShapeDtypeStruct((2, 2), "float32")})
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: {name!r} does not take {dict(options)}: {reason}") from error


def check_splits(
    config: Mapping[str, Any], splits: Collection[str], where: Any, log: Callable[[str], None]
) -> None:
    """Raises UserError for a split that the data lacks and no corpus is known to have.

    Args:
      config: of the run.
      splits: that the data has.
      where: it is, for messages.
      log: is told what is left out instead.
    """
    stored = {"splits": dict.fromkeys(splits)}
    evaluated = config["data"]["eval"]
    wanted = {
        "data.train": [config["data"]["train"]],
        "data.eval": evaluated,
        "evaluation.while_training": config["evaluation"]["while_training"],
        "seed_training.split": [config["seed_training"]["split"]],
    }
    for field, names in wanted.items():
        for name in names:
            if not has_split(stored, name) and name not in KNOWN_SPLITS:
                raise UserError(
                    f"{field}: there is no split {name!r} in {where}: choose of {', '.join(splits)}"
                )
    for name in config["evaluation"]["while_training"]:
        if evaluated and name not in evaluated and has_split(stored, name):
            log(f"evaluation.while_training: {name!r} is not in data.eval and is not evaluated")
