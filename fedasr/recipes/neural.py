"""Neural recordings, prepared by `fedasr prepare`: each day a client with its own layer.

    --config=neural:model=speech --config.data.dir=DIR

model: "speech" (256 channels, five layers of 1024; Willett et al., 2023) or "handwriting" (192
channels, two of 512; Fan et al., 2023; its data is prepared with --stride=2).
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from fedasr.models.recurrent import SPEECH, RecurrentConfig
from fedasr.recipes import shared
from fedasr.text import CHARACTERS
from fedasr.training.config import default_config

# Spelled in our alphabet; for labels that are phonemes set model.options.vocab=41.
_VOCAB = len(CHARACTERS) + 1
MODELS: dict[str, Any] = {
    "speech": dataclasses.replace(SPEECH, vocab=_VOCAB),
    "handwriting": RecurrentConfig(vocab=_VOCAB),
}
ARGUMENTS: dict[str, Any] = {"model": "speech"}


def get_config(arguments: str = "") -> ConfigDict:
    """Federated learning without privacy: all days in every round, one pass over each."""
    args = shared.parse(arguments, ARGUMENTS)
    config = default_config()
    config.name = f"neural-{args['model']}"
    config.model.name = "recurrent"
    config.model.options = ConfigDict(dataclasses.asdict(shared.choose(args, "model", MODELS)))
    config.data.eval = ("test",)
    config.local.patterns = ("^day/",)
    config.local.prototype = "last"  # a new day begins like the day before
    config.privacy.enabled = False
    config.privacy.sampler = "everyone"
    config.cohort = 0
    config.rounds = 100
    config.client.learning_rate = 0.2
    config.client.batch_size = 16
    config.client.steps = 0
    config.client.epochs = 1
    config.client.grad_clip = 10.0
    config.server.optimizer = "sgd"
    config.server.options.momentum = 0.5
    config.server.learning_rate = 1.0
    config.evaluation.while_training = ("test",)
    return config
