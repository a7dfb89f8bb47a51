"""Self-training on users without transcripts: python -m experiments.self_training."""

from ml_collections import ConfigDict

from fedasr.recipes import mini


def get_config() -> ConfigDict:
    """A tenth of the users labelled, spoken digits, 0.17M parameters."""
    config = mini.get_config()
    config.name = "self_training"
    config.chunk = 1
    # The model that begins: central steps on the labelled users' utterances.
    config.seed_training.steps = 600
    config.seed_training.learning_rate = 2e-3
    # Between the rounds, on the same utterances.
    config.central.optimizer = "sgd"
    config.central.learning_rate = 0.3
    # Mild: as published it is too much for a model as small as this.
    config.augment.enabled = True
    config.augment.options.update({"time_masks": 2, "frequency_masks": 1, "frequency_width": 20})
    config.rounds = 60
    config.server.learning_rate = 0.01
    config.server.decay_start = 40
    config.server.decay_rounds = 10

    with config.unlocked():
        config.self_training = ConfigDict()
        config.self_training.labelled = 0.1  # share of users with transcripts
        config.self_training.central_steps = 4  # after every round
        config.self_training.every = 10  # rounds between one labelling and the next
        config.self_training.decay = 0.0  # of the running mean that teaches
        config.self_training.confidence = 0.6  # the least; 0 keeps all that is not empty
        config.self_training.words = (
            -3.0
        )  # least mean log probability a word, nats; -1e9 for no language model
        config.self_training.order = 3  # of the language model of the labelled users' transcripts
    return config
