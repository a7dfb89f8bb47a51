"""Small runs in every mode, by name: what they change in the default configuration."""

import dataclasses
from typing import Any

from fedasr.models.conformer import ConformerConfig
from fedasr.models.recurrent import RecurrentConfig
from fedasr.models.transformer import TransformerConfig

TRANSFORMER = TransformerConfig(dim=16, blocks=1, heads=2, mlp=32)
CONFORMER = ConformerConfig(dim=16, blocks=1, heads=2, mlp=32, conv_kernel=4)
RECURRENT = RecurrentConfig(vocab=30, features=80, units=8, layers=1)


def model(name: str, config: Any) -> dict[str, Any]:
    """The settings of a model."""
    return {"model.name": name, "model.options": dataclasses.asdict(config)}


RNNT = dataclasses.replace(
    TRANSFORMER, objective="rnnt", ctc_weight=0.3, prediction_dim=8, joint_dim=8
)
MODES: dict[str, dict[str, Any]] = {
    "dense": {},
    "global clipping, fixed size": {"privacy.budget": "global", "privacy.sampler": "fixed"},
    "store": {"client.steps": 0, "client.epochs": 2},
    "resident": {"client.steps": 0, "client.epochs": 1, "data.resident": True},
    "micro-batch": {"client.micro_batch": 2, "chunk": 1},
    "batches of seconds": {"client.batch_seconds": 1.5, "client.steps": 0, "client.epochs": 1},
    "weighted": {"client.weighting": "examples", "privacy.enabled": False},
    "adaptive": {"privacy.adaptive.enabled": True, "privacy.adaptive.sigma": 1.0},
    "banded": {"privacy.noise": "banded", "privacy.bands": 2, "privacy.cycle": 2},
    "skellam": {"privacy.noise": "skellam", "privacy.sigma": 0.02},
    "not private": {"privacy.enabled": False, "client.proximal": 0.01},
    "local": {"local.patterns": ("front_end",), **model(
        "transformer", dataclasses.replace(TRANSFORMER, input_layer=True)
    )},
    "partial, compressed": {
        "partial.mode": "round", "compression.upload": "S1E4M3"
    },
    "central": {"algorithm": "central", "central.steps": 3},
    "seed first": {"seed_training.steps": 2},
    "two devices": {"devices": 2, "chunk": 2},
    "rnnt": model("transformer", RNNT),
    "conformer": model("conformer", CONFORMER),
    "recurrent": model("recurrent", RECURRENT),
    "augmented later": {"augment.enabled": True, "augment.start_round": 1},
}  # fmt: skip
