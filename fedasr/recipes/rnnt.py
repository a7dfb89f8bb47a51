"""The quickstart's data and training with the RNN-T objective in place of CTC.

    --config=rnnt:model=conformer

model: "transformer" or "conformer".
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from fedasr.models.conformer import ConformerConfig
from fedasr.models.transformer import TransformerConfig
from fedasr.recipes import quickstart, shared

MODELS: dict[str, Any] = {"transformer": TransformerConfig, "conformer": ConformerConfig}
ARGUMENTS: dict[str, Any] = {"model": "transformer"}


def get_config(arguments: str = "") -> ConfigDict:
    """A seed from two accents and private federated learning on five, as in the quickstart."""
    args = shared.parse(arguments, ARGUMENTS)
    model = shared.choose(args, "model", MODELS)
    config = quickstart.get_config()
    config.name = f"rnnt-{args['model']}"
    config.model.name = args["model"]
    # A quarter of the frame rate keeps the lattice small; CTC shows the encoder early what to do.
    options = model(objective="rnnt", stride=4, ctc_weight=0.3)
    config.model.options = ConfigDict(dataclasses.asdict(options))
    return config
