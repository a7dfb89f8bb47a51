"""The programs of a configuration, lowered for devices that need not be there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedasr.audio.features import LogMelConfig
from fedasr.errors import UserError
from fedasr.federated.local import Rows
from fedasr.federated.simulation import Simulation
from fedasr.models.pretrained.registry import FAMILIES
from fedasr.models.recurrent import RecurrentConfig
from fedasr.training.builders import corpora, models, simulations
from fedasr.training.config import Config

_FRAMES_PER_SECOND = 100  # of log-mel features, and of what brain-to-text bins at most
_MELS = LogMelConfig().num_mels
_PASS = 8  # batches of a user where the configuration counts passes over their examples


class ShapedCorpus:
    """Users whose examples are all alike, and zeros: what a program's shapes follow from.

    Args:
      users: how many. examples: of each. frames, labels: of every example. features: of a frame.
    """

    def __init__(self, users: int, examples: int, frames: int, labels: int, features: int) -> None:
        self.users = [f"user-{i}" for i in range(users)]
        self.sizes = np.full(users, examples, np.int64)
        self._shape, self._labels = (frames, features), labels

    def lengths(self, user: int) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        count = int(self.sizes[user])
        return {
            "features": np.full(count, self._shape[0], np.int32),
            "labels": np.full(count, self._labels, np.int32),
        }

    def get(self, user: int, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """See `fedasr.data.corpus.Corpus`."""
        return [
            {
                "features": np.zeros(self._shape, np.float16),
                "labels": np.ones(self._labels, np.int32),
            }
            for _ in indices
        ]


class ShapedData:
    """In place of a run's data (`fedasr.training.builders.corpora.Data`): one corpus of shapes."""

    def __init__(self, config: Config, train: ShapedCorpus) -> None:
        self.train, self.grid = train, corpora.client_grid(config)

    def resident(self, sharding: Any) -> None:
        """Nothing lies on the devices: the corpus has no size."""


class ShapedStore(NamedTuple):
    """In place of users' rows (`fedasr.federated.local.LocalStore`), of which there are none."""

    layout: Rows
    users: int
    prototype: str


def make_simulation(
    config: Config,
    devices: Sequence[jax.Device],
    chunk: int,
    *,
    seconds: float = 15.0,
    labels_per_second: float = 14.0,
) -> Simulation:
    """The federated rounds of a configuration on users whose utterances are all equally long.

    Args:
      config: of the run; its data is not read.
      devices: to compile for.
      chunk: clients vmapped together on a device.
      seconds: of every utterance. labels_per_second: read English has about 14 characters.

    Raises:
      UserError: the configuration has no rounds, or a model that hears samples.
    """
    if not config.has_rounds:
        raise UserError(f"algorithm={config.algorithm}: only programs of rounds are compiled")
    if config.model.name in FAMILIES:
        raise UserError(f"model.name={config.model.name}: programs of samples are not compiled")
    frames = max(1, round(seconds * _FRAMES_PER_SECOND))
    labels = max(1, round(seconds * labels_per_second))
    client = config.client
    batch = client.batch_size
    if client.batch_seconds:
        batch = max(1, int(client.batch_seconds / seconds))
    examples = batch * (client.steps or client.max_steps or _PASS)
    default = RecurrentConfig.features if config.model.name == "recurrent" else _MELS
    features = int(config.model.options.get("features", default))
    users = max(1, config.cohort) * 2  # a cohort of them is a sample
    corpus = ShapedCorpus(users, examples, frames, labels, features)
    data: Any = ShapedData(config, corpus)
    loss = models.build_recogniser(config).loss
    layout = models.local_layout(config)
    store: Any = None if layout is None else ShapedStore(layout, users, config.local.prototype)
    return simulations.make_simulation(config, data, loss, devices, store, chunk)
