"""Rounds of a configuration on random speech: neither a prepared corpus nor a recipe is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.workload import RandomSpeech
from fedasr.data.batching import Resident, make_buckets, make_resident
from fedasr.federated.simulation import Simulation
from fedasr.models.recogniser import INPUTS
from fedasr.training.builders import corpora, models, simulations
from fedasr.training.config import Config

ROOT = np.arange(8, dtype=np.uint32)  # of everything random: alike whatever the device rounds to


class RandomData:
    """In place of a run's data (`fedasr.training.builders.corpora.Data`): random training users."""

    def __init__(self, config: Config, train: RandomSpeech) -> None:
        self.train, self.grid = train, corpora.client_grid(config)
        self._resident = config.data.resident

    def resident(self, sharding: Any) -> Resident | None:
        """All examples, if the configuration wants them on the devices."""
        if not self._resident:
            return None
        found = make_resident(self.train, make_buckets([self.train]), INPUTS)
        return jax.device_put(found, sharding)


def configuration(changes: Mapping[str, Any]) -> Config:
    """The default configuration with other fields, by names with dots."""
    tree: dict[str, Any] = {}
    for name, value in changes.items():
        *sections, field = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return Config.of(tree)


def make(
    config: Config, train: RandomSpeech, devices: Sequence[jax.Device], chunk: int | None = None
) -> Simulation:
    """The configuration's rounds; see `fedasr.training.builders.simulations.make_simulation`."""
    data: Any = RandomData(config, train)
    loss = models.build_recogniser(config).loss
    return simulations.make_simulation(config, data, loss, devices, None, chunk)


def parameters(config: Config) -> Any:
    """Where a model begins: random, and the same bits on every device.

    Matrices are normal with a standard deviation of 1 / sqrt(rows), what is called "scale" is 1 and
    all other vectors are small.
    """

    def one(path: Any, shape: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(list(name.encode()))
        drawn = rng.standard_normal(shape.shape, np.float32)
        if len(shape.shape) > 1:
            return drawn * np.float32(np.prod(shape.shape[:-1]) ** -0.5)
        return np.float32("scale" in name) + np.float32(0.02) * drawn

    return jax.tree_util.tree_map_with_path(one, models.variable_shapes(config))
