"""Neural recordings, prepared by `fedasr prepare`: each day a client with its own layer.

    --config=neural:model=speech,labels=phonemes --config.data.dir=DIR
    --config=neural:model=speech,labels=phonemes,training=central --config.data.dir=DIR

model: "speech" (256 channels, five layers of 1024; Willett et al., 2023) or "handwriting" (192
channels, two of 512; Fan et al., 2023; its data is prepared with --stride=2), as published.
training: "federated", days as clients, or "central", as published: a day at random for each batch,
with its own layer. labels: what the data was prepared with: "characters" (29), "phonemes"
(--lexicon; the published speech) or "handwriting" (31 characters; the published handwriting).
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from fedasr.models.recurrent import PUBLISHED, SPEECH, RecurrentConfig
from fedasr.recipes import shared
from fedasr.text import CHARACTERS, HANDWRITING, PHONEMES
from fedasr.training.config import default_config

MODELS: dict[str, Any] = {
    "speech": dataclasses.replace(SPEECH, **PUBLISHED),
    "handwriting": RecurrentConfig(**PUBLISHED),
}
# Tokens with the blank; phonemes have silence beside them.
LABELS = {
    "characters": len(CHARACTERS) + 1,
    "phonemes": len(PHONEMES) + 2,
    "handwriting": len(HANDWRITING) + 1,
}
# (rate, steps in which it would fall to 0, steps, sentences in a batch, steps to a validation).
CENTRAL = {
    "speech": (0.02, 10_000, 10_000, 64, 50),
    "handwriting": (0.01, 100_000, 20_000, 48, 500),
}
ARGUMENTS: dict[str, Any] = {"model": "speech", "training": "federated", "labels": "characters"}


def get_config(arguments: str = "") -> ConfigDict:
    """All days in every round without privacy, one pass over each; or the central baseline."""
    args = shared.parse(arguments, ARGUMENTS)
    config = default_config()
    model = shared.choose(args, "model", MODELS)
    config.name = f"neural-{args['model']}"
    config.model.name = "recurrent"
    model = dataclasses.replace(model, vocab=shared.choose(args, "labels", LABELS))
    config.model.options = ConfigDict(dataclasses.asdict(model))
    config.data.eval = ("test",)
    config.local.patterns = ("^day/",)
    config.local.prototype = "last"  # a new day begins like the day before
    config.privacy.enabled = False
    config.evaluation.while_training = ("test",)
    shared.choose(args, "training", {"federated": _federated, "central": _central})(config, args)
    return config


def _federated(config: ConfigDict, args: dict[str, Any]) -> None:
    """Ours: nothing was published."""
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


def _central(config: ConfigDict, args: dict[str, Any]) -> None:
    """As published: Keras' Adam, and the best state on the split that is reported."""
    config.name += "-central"
    config.algorithm = "central"
    central = config.central
    central.optimizer = "keras_adam"
    central.options = ConfigDict({"eps": 0.1})
    central.learning_rate, central.decay_steps, central.steps, central.batch_size, every = CENTRAL[
        args["model"]
    ]
    central.decay_linear = True
    central.grad_clip = 10.0
    config.evaluation.every_steps = every
    config.selection.split = "test"
