"""Evaluation of a run's parameters."""

from collections.abc import Sequence

import jax

from fedasr.federated.local import Rows
from fedasr.models.recogniser import Recogniser
from fedasr.training.builders import corpora, decoders
from fedasr.training.config import Config
from fedasr.training.evaluation import Evaluator, evaluation_buckets


def make_evaluator(
    config: Config,
    recogniser: Recogniser,
    data: corpora.Data,
    devices: Sequence[jax.Device],
    layout: Rows | None = None,
) -> Evaluator:
    """What decodes the evaluation splits.

    Args:
      config, recogniser, data: of the run.
      devices: of this process.
      layout: of local parameters, to evaluate users with their own.

    Raises:
      UserError: see `decoders.make_run_decoder`.
    """
    decoder = decoders.make_run_decoder(
        config.decoding, data.directory, data.tokenizer, data.evaluation
    )
    return Evaluator(
        recogniser,
        evaluation_buckets(list(data.evaluation.values())),
        config.evaluation.batch_size,
        devices,
        data.tokenizer,
        layout,
        config.model_devices,
        config.evaluation.published,
        decoder,
    )
