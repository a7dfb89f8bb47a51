"""Learning fresh words from users' corrections: python -m experiments.corrections."""

from ml_collections import ConfigDict

from fedasr.training.config import default_config


def get_config() -> ConfigDict:
    """A 0.4M-parameter recogniser of errands; three seeds take about half an hour on two cores."""
    config = default_config()
    config.name = "corrections"
    config.data.task = "fresh"
    config.model.options.update({"dim": 96, "mlp": 384, "blocks": 3})
    config.rounds = 80
    config.cohort = 8
    config.chunk = 1
    config.seed_training.steps = 1200
    config.seed_training.learning_rate = 2e-3
    config.client.learning_rate = 0.3
    config.server.learning_rate = 0.004
    config.server.decay_start = 50
    config.server.decay_rounds = 10
    # Central steps between the rounds, where there are any.
    config.central.optimizer = "sgd"
    config.central.learning_rate = 0.3
    config.privacy.clip_norm = 0.4
    config.privacy.budget = "uniform"
    config.privacy.sigma = 4.5e-4

    with config.unlocked():
        config.corrections = ConfigDict()
        # Fields of `fedasr.data.synthetic.SyntheticConfig`.
        config.corrections.corpus = ConfigDict(
            {
                "seed_users": 192,
                "train_users": 80,
                "dev_users": 24,
                "test_users": 32,
                "seed_utterances": (20, 26),
                "train_utterances": (16, 28),
                "dev_utterances": (16, 24),
                "test_utterances": (16, 24),
            }
        )
        # Of `EditConfig` and `Filters` in `fedasr.feedback.corrections`.
        config.corrections.edits = ConfigDict(
            {
                "active": 0.9,
                "corrected": 0.8,
                "typos": 0.08,
                "wrong_words": 0.08,
                "rewritten": 0.1,
            }
        )
        config.corrections.filters = ConfigDict(
            {"max_changed": 0.5, "min_similarity": 0.4, "min_frames": 50, "trusted": 2.0}
        )
        # Of `fedasr.feedback.weighting`.
        config.corrections.words = ConfigDict({"trusted": 4.0, "power": 1.0, "floor": 0.02})
        config.corrections.quality = ConfigDict({"temperature": 0.5, "step": 1.0, "utterances": 32})
        config.corrections.most = 32  # words, and pairs, of a user that the histograms count
        # Noise multipliers of the two histograms, where there is privacy.
        config.corrections.histogram_noise = 0.02
        config.corrections.central_steps = 4  # after every round of joint training
        # An averaged model: so many last rounds, and the first of these shares of the stale
        # recogniser at which dev's general WER is worse by no more than the margin (points).
        config.corrections.averaged = 10
        config.corrections.stale_shares = (0.0, 0.125, 0.25, 0.375, 0.5)
        config.corrections.general_margin = 0.25
    return config
