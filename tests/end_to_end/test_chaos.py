"""A few random faults; `python -m experiments.chaos` has many."""

from multiprocessing import forkserver

import pytest

from experiments.chaos import Chaos


@pytest.fixture(autouse=True)
def own_forkserver():
    """Processes of other tests are not to be forked from one with this one's environment."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.mark.long  # moments are random, and too little memory has ended in a traceback
def test_a_few_faults_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    said = []
    with Chaos(tmp_path, seed=0, say=said.append) as chaos:
        chaos.run(6)
        assert not chaos.failures, chaos.failures
        assert sum(chaos.results.values()) == 6
        # It notices what it is there to notice: here, another result.
        chaos._turn = 0
        chaos._wholes[0]["output"]["bias"] += 1.0
        chaos._compare(tmp_path / "whole", "planted")
        (failure,) = chaos.failures
        assert failure.startswith("planted: other parameters, in 1 arrays, by up to 1")
        assert said[-1] == f"FAILED: {failure}"
