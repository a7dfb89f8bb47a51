"""What tells a run from all others."""

import copy
import json

from fedasr.training.config import Config, what
from fedasr.training.workdir import LATER, has_fixed_rounds


def run_identity(config: Config) -> str:
    """What tells a run from all others, beside the parameters that it starts from.

    All of the configuration, with what names its data: where things lie is left out, and so is
    what looks at training and has no part in it (how it is decoded, which of its states is kept,
    whether the seed was there already), and the number of rounds where a longer run goes through
    the same rounds as a shorter one. Under correlated noise it does not: the noise is made for so
    many rounds.
    """
    tree = copy.deepcopy(what(config.tree()))
    del tree["data"]["dir"], tree["init_from"], tree["decoding"], tree["selection"]
    del tree["evaluation"]["every_steps"], tree["seed_training"]["reuse"]
    tree["data"].pop("knowledge", None)  # of decoding
    tree.pop("start", None)  # the root has the parameters themselves
    for name, value in LATER.items():
        *sections, leaf = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.get(section, {})
        if inner.get(leaf, ...) == value:
            del inner[leaf]
    # Nor does a section that is new.
    tree = {name: value for name, value in tree.items() if value != {}}
    if not has_fixed_rounds(config):
        del tree["rounds"]
    return json.dumps(tree, sort_keys=True)
