"""What tells a run from all others."""

import copy
import json
from collections.abc import Mapping
from typing import Any


def run_identity(config: Mapping[str, Any]) -> str:
    """What tells a run from all others, beside the parameters that it starts from.

    All of the configuration, with what names its data: where things lie is left out, and so is the
    number of rounds where a longer run goes through the same rounds as a shorter one. Under
    correlated noise it does not: the noise is made for so many rounds.
    """
    config = copy.deepcopy(dict(config))
    config["data"].pop("dir")
    config.pop("init_from")
    config.pop("start", None)  # the root has the parameters themselves
    if config["privacy"]["noise"] not in ("banded", "buffered"):
        config.pop("rounds")
    return json.dumps(config, sort_keys=True)
