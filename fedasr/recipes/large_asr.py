"""Federated training of a large CTC Conformer, one gradient a client and round (arXiv 2408.10443).

    --config=large_asr:size=small,cohort=16

size: "large", 130M parameters, on LibriSpeech; "small", 1.3M parameters, on the synthetic digits,
for a CPU. data, train: a prepared corpus and its split in place of these. remat: "block" for
clients that keep the inputs of blocks only (the large one's default), or "none". cohort, rounds,
server_lr, chunk: the configuration's fields.

The paper's tables are not public: model, FedSGD and gradient checkpointing are its, rates and
counts are ours.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from fedasr.models.conformer import ConformerConfig
from fedasr.recipes import shared
from fedasr.recipes.librispeech import USERS
from fedasr.training.config import default_config

# The public large Conformer has 17 blocks of this shape, and 130M parameters with a recurrent
# decoder that CTC does not have; 17 blocks alone have 105M. Four more blocks stand in for the
# decoder, so that the size is the published one and every matrix has its published shape.
SIZES: dict[str, dict[str, Any]] = {
    "large": {
        "dim": 512,
        "blocks": 21,
        "heads": 8,
        "mlp": 2048,
        "conv_kernel": 32,
        "dropout": 0.1,
        "dtype": "bfloat16",
    },
    "small": {},
}
ARGUMENTS: dict[str, Any] = {
    "size": "large",
    "data": "",
    "train": "",
    "init_from": "",
    "remat": "",
    "cohort": 0,  # 0 or "": the size's own, as for the rest
    "rounds": 0,
    "server_lr": 0.0,
    "chunk": 1,
}


def get_config(arguments: str = "") -> ConfigDict:
    """FedSGD of the size that `arguments` select, without privacy."""
    args = shared.parse(arguments, ARGUMENTS)
    options = shared.choose(args, "size", SIZES)
    large = args["size"] == "large"
    config = default_config()
    config.name = f"large-asr-{args['size']}"
    config.cohort = args["cohort"] or (128 if large else 16)
    config.rounds = args["rounds"] or (2000 if large else 200)
    config.chunk = args["chunk"]
    config.init_from = args["init_from"]
    if large:
        config.data.dir = args["data"] or "data/librispeech"
        config.data.train = args["train"] or "ls960"
        config.data.population = USERS.get(config.data.train, 0)
        config.data.eval = ("dev_clean", "dev_other", "test_clean", "test_other")
        config.data.buckets = 4
        config.evaluation.while_training = ("dev_clean", "dev_other")
        config.evaluation.every, config.checkpoint.every = 100, 50
    else:
        config.data.dir = args["data"]
        config.data.train = args["train"] or "train"

    config.model.name = "conformer"
    model = ConformerConfig(**options, remat=args["remat"] or ("block" if large else "none"))
    config.model.options = ConfigDict(dataclasses.asdict(model))
    config.augment.enabled = large

    # FedSGD: with a rate of 1 the client's update is its gradient, clipped by local_training.
    config.client.optimizer, config.client.learning_rate = "sgd", 1.0
    config.client.steps, config.client.batch_size = 1, 4
    config.server.optimizer = "adam"
    config.server.learning_rate = args["server_lr"] or (1e-3 if large else 2e-3)
    config.privacy.enabled = False
    config.privacy.sampler = "fixed"
    return config
