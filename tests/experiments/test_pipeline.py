"""The benchmark of the input pipeline finds a slow one."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmarks import pipeline, plots
from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler

USERS = {f"u{i}": [{"x": np.float32(i)}] for i in range(4)}


class Slow(InMemoryCorpus):
    def get(self, user, indices):
        time.sleep(0.05)
        return super().get(user, indices)


@pytest.mark.parametrize(("corpus", "least", "most"), [(Slow, 0.5, 1.0), (InMemoryCorpus, 0, 0.9)])
def test_waiting_for_data_is_found(corpus, least, most):
    def loss(params, batch, key):
        return jnp.mean(jnp.square(params["a"] - batch["x"])), {}

    simulation = Simulation(
        corpus(USERS),
        Mechanism(1.0, "global", 0.0, FixedSizeSampler(4, 4, seed=0)),
        FedAvg(local_training(loss, optax.sgd(0.1)), optax.sgd(1.0)),
        Batching(1, steps=1),
        hardware=Hardware(jax.devices()[:1]),
    )
    batcher, state = simulation.batcher, simulation.init({"a": jnp.float32(0)})
    found = pipeline.measure(simulation, state, rounds=2, repeats=2)
    assert simulation.batcher is batcher
    assert least <= found["idle"] <= most
    assert found["memory_seconds"] > 0
    if corpus is Slow:
        assert found["reading_seconds"] >= 0.2 and found["disk_seconds"] >= 0.2
        assert found["waiting"] > 0.5


def test_plots_show_every_figure(tmp_path):
    """The bars of the benchmarks' plots are as long as the figures."""
    found = {"disk_seconds": 3.0, "memory_seconds": 2.0, "reading_seconds": 1.0, "idle": 1 / 3}
    pipeline.draw(found, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    _, (axes,) = plots.panels(1, 4, 3)
    plots.bars(axes, {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 4.0}}, "steps")
    assert [bar.get_width() for bar in axes.patches] == [1.0, 3.0, 2.0, 4.0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xlabel() == "steps"
