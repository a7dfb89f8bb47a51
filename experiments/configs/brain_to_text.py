"""Brain-to-text on synthetic recordings: python -m experiments.brain_to_text."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A small decoder, 12 days to train on and 10 days of drift after them."""
    return ConfigDict(
        {
            "name": "brain_to_text",
            "train_days": 12,
            # Fields of `fedasr.data.neural_synthetic.NeuralConfig`; the seed is the run's.
            "recordings": {
                "days": 22,
                "train_sentences": 50,
                "test_sentences": 50,
                "holdout_sentences": 10,
                "words": (3, 4),
                "electrodes": 64,
                "informative": 64,
            },
            "areas": "tx1[0:64],spikePow[0:64]",
            # Fields of `fedasr.models.recurrent.RecurrentConfig`; vocab and features follow.
            "model": {
                "units": 128,
                "layers": 2,
                "subsample": 2,
                "window": 8,
                "stride": 2,
                "dropout": 0.3,
                "white_noise": 0.8,
                "offset_noise": 0.2,
                "walk_noise": 0.0,
            },
            "training": {"steps": 2400, "batch_size": 16, "learning_rate": 0.02},
            # A day is a client; local SGD, server SGD. The clients' rate falls linearly to 0.
            "federated": {
                "rounds": 480,
                "cohort": 3,
                "epochs": 1,
                "batch_size": 16,
                "learning_rate": 0.2,
                "momentum": 0.0,
                "grad_clip": 10.0,
                "server_learning_rate": 1.0,
                "server_momentum": 0.5,
            },
            "language": {
                "sentences": 5000,
                "withheld": 0.03,  # of the words
                "order": 3,
                "beam": 16,
                "unknown_penalty": 6.0,
                # Tried on the held-out sentences of the training days.
                "lm_weights": (0.2, 0.4, 0.6, 1.0),
                "word_bonuses": (0.0, 2.0),
            },
            # A new day's own layer from so many labelled sentences, the rest of the model at rest;
            # then so many passes, each as long, with the day's other sentences as they are decoded.
            "calibration": {
                "days": 5,
                "sentences": 20,
                "passes": 2,
                "steps": 200,
                "batch_size": 20,
                "learning_rate": 0.02,
                # Of the decoder's training, in place of the model's.
                "noise": {"drift_noise": 0.3, "channel_dropout": 0.1},
            },
            # `portion` sentences are decoded before each training. The other fields are those of
            # `fedasr.training.recalibration.RecalibrationConfig`.
            "recalibration": {
                "portion": 25,
                "learning_rate": 0.01,
                "steps": 120,
                "today": 0.6,
                "batch_size": 16,
                # The published 4.0, which belongs to training after every sentence (see
                # `brain_recalibration`), ended this training too early.
                "threshold": 0.0,
                "window": 10,
            },
        }
    )
