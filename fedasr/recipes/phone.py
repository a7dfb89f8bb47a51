"""A recogniser trained on small devices: all that saves memory and transport, with privacy.

FedSGD with gradient checkpointing; parameters travel and rest in 11 bits; every client trains its
own tenth of the weight matrices and sends 11-bit gradients, clipped per layer; the server adds the
noise.
"""

from ml_collections import ConfigDict

from fedasr.recipes import large_asr


def get_config(arguments: str = "size=small") -> ConfigDict:
    """`arguments` are those of large_asr.py; size=large is the 130M Conformer."""
    config = large_asr.get_config(arguments)  # FedSGD of a Conformer
    config.name = config.name.replace("large-asr", "phone")
    config.model.options.remat = "block"  # keep the inputs of blocks only

    config.compression.download = "S1E3M7"  # online model compression
    config.compression.upload = "S1E3M7"
    config.compression.share = 0.9  # of the weight matrices; the rest in float32

    config.partial.mode = "user"  # another subset for every client and round
    config.partial.share = 0.1

    config.privacy.enabled = True
    config.privacy.sampler = "poisson"
    config.privacy.clip_norm, config.privacy.budget = 0.4, "uniform"
    config.privacy.sigma = 4.5e-4
    return config
