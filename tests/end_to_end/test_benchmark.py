"""The benchmark of a round prints what it promises; how fast is not tested here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_cohort_benchmark_prints_its_figures(program, tmp_path):
    done = program(
        "experiments.benchmarks.cohort",
        "--clients=4",
        "--dim=16",
        "--blocks=1",
        "--frames=24",
        "--rounds=1",
        "--chunks=1,all",
        f"--plot={tmp_path / 'plot.png'}",
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
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
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


@pytest.mark.long
def test_peers_do_rounds_in_turns(program, tmp_path):
    """Without the peers themselves, which need a network to be installed."""
    done = program(
        "experiments.benchmarks.peers",
        f"--envs={tmp_path}",
        "--peers=fedasr,one client at a time",
        "--sizes=50k",
        "--clients=2",
        "--frames=100",
        "--turns=1",
        "--rounds=2",
        f"--plot={tmp_path / 'plot.png'}",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    speeds = found["client_steps_per_second"]["50k"]
    assert list(speeds) == ["fedasr", "one client at a time"]
    assert all(value > 0 for kinds in speeds.values() for value in kinds.values())
    for name, ratios in found["ratio"]["50k"].items():
        for kind, ratio in ratios.items():
            assert ratio == pytest.approx(speeds["fedasr"][kind] / speeds[name][kind])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_peer_that_cannot_start_is_named(program, tmp_path):
    (tmp_path / "pfl").mkdir()
    python = tmp_path / "pfl" / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    (tmp_path / "pfl" / "installed.json").write_text(json.dumps(["pfl==0.6.0", "torch"]))
    done = program(
        "experiments.benchmarks.peers", f"--envs={tmp_path}", "--peers=pfl 1 process", "--sizes=50k"
    )
    assert done.returncode == 2 and "pfl-1-process.log" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_device_script_runs_to_its_end_on_a_cpu(corpus_dir, program_environment, tmp_path):
    environment = program_environment | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [
            Path(__file__).parents[2] / "experiments" / "benchmarks" / "device.sh",
            "--tiny",
            f"--out={tmp_path}",
            f"--data={corpus_dir}",
            "--minutes=60",
            "--stage_seconds=900",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    found = json.loads((tmp_path / "cpu-tiny.json").read_text())["stages"]
    assert done.returncode == 0, done.stderr
    assert {name: stage["status"] for name, stage in found.items()} == dict.fromkeys(found, "done")
    assert all(stage["rows"] for stage in found.values()) and len(found) == 8
