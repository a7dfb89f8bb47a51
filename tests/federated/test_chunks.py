import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.chunks import device_budget, fit_chunk
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import PoissonSampler

SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]


@given(
    base=st.integers(0, 50),
    each=st.integers(1, 30),
    bend=st.integers(0, 3),
    most=st.integers(1, 100),
    budget=st.integers(1, 2000),
)
def test_the_largest_that_fits(base, each, bend, most, budget):
    """Also where memory grows faster than in a straight line."""
    measured = []

    def memory(chunk):
        measured.append(chunk)
        return base + each * chunk + bend * max(0, chunk - 2) ** 2

    fitting = [size for size in SIZES if size <= most and memory(size) <= budget]
    measured.clear()
    if not fitting:
        with pytest.raises(UserError, match="single client"):
            fit_chunk(memory, most, budget)
        return
    found = fit_chunk(memory, most, budget)
    assert found == max(fitting)
    assert found in measured  # what is chosen has been measured
    if not bend:
        assert len(measured) <= 3  # each is a compilation


def test_memory_grows_with_the_chunk():
    rng = np.random.default_rng(0)
    corpus = InMemoryCorpus(
        {
            f"u{i}": [{"x": rng.normal(size=n).astype(np.float32), "y": np.float32(n)}]
            for i, n in enumerate([3, 9, 30])
        }
    )

    def loss(params, batch, key):
        error = batch["x"].sum(1) * params["w"].sum() - batch["y"]
        return (batch["mask"] * error**2).sum(), {}

    params = {"w": jax.ShapeDtypeStruct((1000,), np.float32)}

    def memory(chunk):
        # Of these rounds the first are empty.
        sampler = PoissonSampler(3, 1, seed=next(seeds), slots=3)
        mechanism = Mechanism(float("inf"), "uniform", 0.0, sampler)
        simulation = Simulation(
            corpus,
            mechanism,
            FedAvg(local_training(loss, optax.sgd(0.1)), optax.adam(0.1)),
            Batching(1, epochs=1),
            hardware=Hardware(jax.devices()[:1], chunk=chunk),
        )
        assert not len(sampler.cohort(0))
        return simulation.chunk_bytes(params)

    empty = [s for s in range(30) if not len(PoissonSampler(3, 1, seed=s, slots=3).cohort(0))]
    seeds = iter(empty)
    one, two, three = memory(1), memory(2), memory(3)
    # At least the server's parameters and two moments, twice, and a sum of updates.
    assert one > (2 * 3 + 1) * 4000
    assert two - one >= 4000 and three > two  # a client's own copy


def test_a_cpu_does_not_tell_its_memory():
    assert device_budget(jax.devices()) is None
