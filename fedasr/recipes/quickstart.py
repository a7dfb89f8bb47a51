"""The quickstart: spoken digits, a seed from two accents, private federated learning on five."""

from ml_collections import ConfigDict

from fedasr.training.config import default_config


def get_config() -> ConfigDict:
    """A 0.9M-parameter CTC Transformer that two CPU cores train in minutes."""
    config = default_config()
    config.name = "quickstart"
    config.rounds = 120
    config.cohort = 8
    config.seed_training.steps = 250
    config.client.learning_rate = 0.3
    config.server.learning_rate = 0.01
    config.server.decay_start = 80
    config.server.decay_rounds = 30
    config.privacy.clip_norm = 0.4
    config.privacy.sigma = 4.5e-4
    return config
