"""Recognisers of separate accents, fused: python -m experiments.fuse_accents."""

from ml_collections import ConfigDict

from fedasr.training.config import default_config


def get_config() -> ConfigDict:
    """A 0.4M-parameter recogniser of spoken digits; eight accents in two groups."""
    config = default_config()
    config.name = "accents"
    config.model.options.update({"dim": 96, "mlp": 384, "blocks": 3})
    config.rounds = 40
    config.cohort = 8  # of a group; a run on the union has as many of every group
    config.seed_training.steps = 900
    config.client.learning_rate = 0.3
    config.server.learning_rate = 0.01
    config.server.decay_start = 25
    config.server.decay_rounds = 15
    config.privacy.clip_norm = 0.4
    config.privacy.sigma = 4.5e-4
    config.evaluation.every = 0
    config.checkpoint.every = 20

    with config.unlocked():
        config.accents = ConfigDict()
        # Fields of `fedasr.data.synthetic.SyntheticConfig`.
        config.accents.corpus = ConfigDict(
            {
                "seed_users": 24,
                "train_users": 144,
                "dev_users": 64,
                "test_users": 128,
                "seed_utterances": (30, 50),
                "train_utterances": (24, 36),
                "dev_utterances": (8, 12),
                "test_utterances": (8, 16),
            }
        )
        config.accents.groups = ConfigDict(
            {
                "british": ("en-gb-scotland", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
                "other": ("en-x-southern", "en-x-alpine", "en-x-iberian", "en-x-dental"),
            }
        )
        config.accents.seed_share = 0.35  # of the groups' training users, for the seed instead
        # Of a search; of each of those between rounds; models in the archive.
        config.accents.evaluations = 60
        config.accents.evaluations_between = 40
        config.accents.population = 10
        config.accents.by_module = False  # a ratio and a split point for each module of the model
        config.accents.every = 15  # rounds between fusions of groups that train side by side
    return config
