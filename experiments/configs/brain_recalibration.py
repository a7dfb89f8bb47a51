"""Recalibration as published beside ours: python -m experiments.brain_recalibration."""

from ml_collections import ConfigDict

from experiments.configs import brain_to_text
from fedasr.models.recurrent import PUBLISHED


def get_config() -> ConfigDict:
    """The decoder of `brain_to_text`, built as published, with fewer days and sentences."""
    config = brain_to_text.get_config()
    with config.unlocked():
        config.name = "brain_recalibration"
        for section in ("calibration", "federated"):
            del config[section]
        config.calibration = ConfigDict({"days": 1})  # none is calibrated
        config.train_days = 8
        config.recordings.update(
            days=11,
            train_sentences=40,
            test_sentences=20,
            holdout_sentences=5,
            words=(3, 3),
        )
        config.model.update(PUBLISHED)
        config.training.update(steps=1600, learning_rate=0.02)
        config.language.update(sentences=3000, beam=8, lm_weights=(0.4, 1.0), word_bonuses=(0.0,))
        config.recalibration.update(portion=10, steps=120)
        # Fields of `fedasr.training.corp.CorpConfig`; the rest is as published.
        config.published = ConfigDict({"batch_size": 64, "threshold": 4.0})
        # Of the recipe `neural`, on all days: 26,400 sentences each.
        config.commands = ConfigDict(
            {"steps": 1650, "batch_size": 16, "rounds": 60, "learning_rate": 0.02}
        )
    return config
