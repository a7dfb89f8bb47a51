"""Recalibration as published beside ours: python -m experiments.brain_recalibration."""

from ml_collections import ConfigDict

from experiments.configs import brain_to_text
from fedasr.models.recurrent import PUBLISHED


def get_config() -> ConfigDict:
    """A smaller decoder than that of `brain_to_text`, built as published, and fewer days."""
    config = brain_to_text.get_config()
    with config.unlocked():
        config.name = "brain_recalibration"
        for section in ("calibration", "federated"):
            del config[section]
        config.calibration = ConfigDict({"days": 1})  # none is calibrated
        config.train_days = 5
        config.recordings.update(
            days=8,
            train_sentences=30,
            test_sentences=15,
            holdout_sentences=5,
            words=(3, 3),
            electrodes=32,
            informative=32,
            # Half of the drift: with all of it so small a decoder writes hardly a right word on
            # the first day after training, and nothing can be learned from what it writes.
            tuning_drift=0.05,
            replaced=0.01,
            rotation=0.03,
            bend_drift=0.03,
            letter_drift=0.025,
            dead=0.015,
        )
        config.areas = "tx1[0:32],spikePow[0:32]"
        config.model.update(PUBLISHED)
        config.model.units = 64
        config.training.update(steps=800, learning_rate=0.02)
        config.language.update(sentences=3000, beam=8, lm_weights=(0.4, 1.0), word_bonuses=(0.0,))
        config.recalibration.update(portion=10, steps=120)
        # Fields of `fedasr.training.corp.CorpConfig`; the rest is as published.
        config.published = ConfigDict({"batch_size": 64, "threshold": 4.0})
        # Of the recipe `neural`, on all days: as many sentences each.
        config.commands = ConfigDict(
            {"steps": 600, "batch_size": 16, "rounds": 60, "learning_rate": 0.02}
        )
    return config
