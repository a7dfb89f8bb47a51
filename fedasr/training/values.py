"""What fields of a configuration may hold, where a range or a list of names does not say it.

Each `check_...` takes a value of any kind and returns what is wrong with it ("must be ..."), or
None. What takes JAX to import is imported when it is asked for.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from fedasr.errors import UserError
from fedasr.fields import bucket, is_number
from fedasr.training.remote.storage import is_remote

CENTRAL = "central"  # the algorithm that forgets the users


def optimizers() -> list[str]:
    """Names of optimisers."""
    from fedasr.federated.server import SERVER_OPTIMIZERS

    return list(SERVER_OPTIMIZERS)


def algorithms() -> list[str]:
    """Names of ways to train: those of the federated algorithms, and one without users."""
    from fedasr.federated.algorithms import ALGORITHMS

    return [*ALGORITHMS, CENTRAL]


def models() -> list[str]:
    """Names of recognisers."""
    from fedasr.models.recogniser import model_configs

    return list(model_configs())


def adaptations() -> list[str]:
    """Kinds of adaptation."""
    from fedasr.models.peft import KINDS

    return list(KINDS)


def frozen_dtypes() -> list[str]:
    """What matrices that are not trained may be kept as."""
    from fedasr.models.peft import FROZEN

    return list(FROZEN)


def decoders() -> list[str]:
    """Names of decoders."""
    from fedasr.decoding.registry import DECODERS

    return list(DECODERS)


def skews() -> list[str]:
    """What users may be made to differ in, and "" for nothing."""
    from fedasr.data.skew import KINDS

    return ["", *KINDS]


def tasks() -> list[str]:
    """Names of synthetic corpora."""
    from fedasr.data import synthetic

    return synthetic.tasks()


def prototypes() -> list[str]:
    """What a new user's local parameters may start from."""
    from fedasr.federated.local import PROTOTYPES

    return list(PROTOTYPES)


def check_place(value: Any) -> str | None:
    """Of a path of what is read."""
    if not isinstance(value, str) or re.fullmatch(r"[^\x00-\x1f]*", value) is None:
        return "must be text on one line"
    return bucket(value)


# How a start begins that is a model that others trained: all of it, or with a new output layer.
WHOLE, ENCODER = "hf:", "hf-encoder:"


def parse_start(value: str) -> tuple[str, str]:
    """(`WHOLE`, `ENCODER` or "", the path) of what a run starts from."""
    for scheme in (WHOLE, ENCODER):
        if value.startswith(scheme):
            return scheme, value.removeprefix(scheme)
    return "", value


def check_start(value: Any) -> str | None:
    """Of what a run starts from."""
    if not isinstance(value, str) or not is_remote(value):
        return check_place(parse_start(value)[1] if isinstance(value, str) else value)
    return check_place(re.sub("://", "/", value))


def check_chunk(value: Any) -> str | None:
    """Of a number of clients that are computed together."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1_000_000
    return None if good or value == "auto" else "must be a number from 0, or 'auto'"


def check_split(value: Any) -> str | None:
    """Of the name of a split."""
    from fedasr.data.splits import can_open

    if not isinstance(value, str):
        return "must be the name of a split"
    try:
        can_open(value, ())
    except UserError as error:
        return f"is no split: {error}"
    return None


def check_optional_split(value: Any) -> str | None:
    """Of the name of a split, or "" for none."""
    return None if value == "" else check_split(value)


def check_format(value: Any) -> str | None:
    """Of the name of a float format."""
    from fedasr.compression.formats import FloatFormat

    if not isinstance(value, str):
        return "must be the name of a float format"
    try:
        FloatFormat.parse(value) if value else None
    except UserError as error:
        return f"is no float format: {error}"
    return None


def check_pattern(value: Any) -> str | None:
    """Of a regular expression."""
    if not isinstance(value, str) or not value:
        return "must be a regular expression"
    try:
        re.compile(value)
    except re.error as error:
        return f"is no regular expression: {error}"
    return None


def check_deployment(value: Any) -> str | None:
    """Of a cohort and a population."""
    good = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    if not good or not 0 < value[0] <= value[1] <= 1e12:
        return "is not (cohort, population)"
    return None if value[1] == math.floor(value[1]) else "must have whole users in its population"


def check_options(value: Any) -> str | None:
    """Options of an optimiser or model, by name; what they mean is for these to check."""
    if not isinstance(value, Mapping):
        return "must be options by name"
    for name, option in value.items():
        if not isinstance(option, bool | str) and not is_number(option):
            return f"has {name}={option!r}, which must be a finite number, a name, True or False"
    return None


def check_numbers(value: Any) -> str | None:
    """Options of an algorithm, numbers by name; what they mean is for it to check."""
    if not isinstance(value, Mapping):
        return "must be numbers by name"
    for name, option in value.items():
        if not is_number(option):
            return f"has {name}={option!r}, which must be a finite number"
    return None
