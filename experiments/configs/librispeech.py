"""Federated LibriSpeech (arXiv 2310.00098), by arguments.

    --config=experiments/configs/librispeech.py:seed=ls100,cohort=16,data=DIR,init_from=RUN

seed: "none" trains LS-960 from scratch, "ls100" LS-860 from a model trained on LS-100, "cv" LS-960
from one trained on Common Voice English; with training=central: the seed or baseline on `split`
(default: the users that federated training would have). The others are in `recipes.ARGUMENTS`.
"""

from ml_collections import ConfigDict

from experiments.configs import recipes

# Training split and its users; the federated rates with a seed are the "from seed" ones.
_SEEDS = {"none": ("ls960", 2338), "ls100": ("ls860", 2087), "cv": ("ls960", 2338)}
USERS = {"ls100": 251, "ls860": 2087, "ls960": 2338}


def get_config(arguments: str = "") -> ConfigDict:
    """The published setting that `arguments` select."""
    known = {**recipes.ARGUMENTS, "split": ""}
    args = recipes.parse(arguments, known)
    split, users = recipes.choose(args, "seed", _SEEDS)
    if args["split"]:
        split, users = args["split"], recipes.choose(args, "split", USERS)
    config = recipes.base_config(f"librispeech-{args['seed']}", args, batch_seconds=360.0)
    config.data.dir = args["data"] or "data/librispeech"
    config.data.train, config.data.population = split, users
    config.data.eval = ("dev_clean", "dev_other", "test_clean", "test_other")
    config.evaluation.while_training = ("dev_clean", "dev_other")
    if args["seed"] == "none":
        recipes.set_rates(config, client=0.4, server=0.006, decay_start=1000, decay_rounds=500)
    else:
        recipes.set_rates(config, client=0.2, server=0.003, decay_start=1000, decay_rounds=250)
    if args["server_lr"]:
        config.server.learning_rate = args["server_lr"]
    return config
