"""The benchmark of a round prints what it promises; how fast is not tested here."""

import json

import pytest


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
