"""The benchmark of a round prints what it promises; how fast is not tested here."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_cohort_benchmark_prints_its_figures(program):
    done = program(
        "experiments.benchmarks.cohort",
        "--clients=4",
        "--dim=16",
        "--blocks=1",
        "--frames=24",
        "--rounds=1",
        "--chunks=1,all",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["chunk"].keys() == {"1", "all"}
    speeds = [figures[key] for key in ("bound", "python_loop", "ragged", "ragged_bound")]
    assert all(speed > 0 for speed in [*speeds, *figures["chunk"].values()])
    assert figures["peak_rss_mb"].keys() == {"4", "32"}
    assert all(megabytes > 10 for megabytes in figures["peak_rss_mb"].values())
    assert "x" in figures["device"]


@pytest.mark.slow
def test_large_benchmark_shrinks_without_an_accelerator(program, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = program("experiments.benchmarks.large", "--steps=1", "--cohort=1", "--json")
    assert done.returncode == 0, done.stderr
    assert "shrunken model" in done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["shrunken"] is True and figures["parameters"] < 1_000_000
    assert figures["seconds_per_round"] > 0 and figures["peak_memory_mb"] > 10
    steps = figures["cohort"] * figures["steps"]
    assert figures["client_steps_per_second"] * figures["seconds_per_round"] == pytest.approx(steps)
    assert figures["model_flop_utilisation"] is None
