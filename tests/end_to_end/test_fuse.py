"""Fusion as a program: digits, recognisers, and a run that is killed."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fedasr.training.checkpoint import read_metadata, restore_params

DIGITS = ("experiments.fuse", "--task=digits", "--json")
SHORT = ("--evaluations=60", "--every=20", "--seeds=2")


def figures(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="the digits need scikit-learn")


@pytest.mark.slow
def test_digits(program, sklearn, tmp_path):
    plot = tmp_path / "curves.png"
    found = figures(program(*DIGITS, "--pretrained", *SHORT, f"--plot={plot}"))
    accuracy = found["test_accuracy"]
    assert len(accuracy["per_seed"]) == 2 and accuracy["std"] > 0
    assert accuracy["mean"] == pytest.approx(np.mean(accuracy["per_seed"]))
    # Two specialists in five digits each are below 50; merged they are above.
    assert found["curve"]["test_accuracy"]["mean"][0] < 50 < accuracy["mean"] <= 100
    assert found["curve"]["evaluations"] == [0, 20, 40, 60] and found["evaluations"] == 60
    assert found["curve"].keys() == {"evaluations", "test_accuracy", "score", "coverage", "entropy"}
    assert found["evaluations_per_second"] > 0
    assert (found["task"], found["method"], found["start"]) == ("digits", "m2n2", "pretrained")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_every_method_runs(program, sklearn):
    pytest.importorskip("evosax", reason="CMA-ES needs evosax")
    names = "m2n2 no_split no_attraction no_crossover ga map_elites cma_es mixing_ratio average"
    names = [*names.split(), "task_arithmetic"]
    found = figures(program(*DIGITS, *SHORT, f"--method={','.join(names)}"))["methods"]
    assert found.keys() == set(names)
    for name, summary in found.items():
        assert summary["evaluations"] == (1 if name == "average" else 60)
        assert 0 <= summary["test_accuracy"]["mean"] <= 100


@pytest.mark.long
def test_killed_it_ends_as_the_uninterrupted_one(program, program_environment, sklearn, tmp_path):
    flags = (*DIGITS[1:], "--evaluations=600", "--every=50", "--seeds=2")
    whole = figures(program(DIGITS[0], *flags))
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", DIGITS[0], *flags, f"--workdir={workdir}", "--save_seconds=0"]
    for _ in range(2):
        process = subprocess.Popen(
            command, env=program_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        folder = workdir / "search" / "m2n2" / "checkpoints"
        seen = {x.name for x in folder.iterdir()} if folder.exists() else set()
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            now = (
                {x.name for x in folder.iterdir() if x.name.isdecimal()}
                if folder.exists()
                else set()
            )
            if now - seen:
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = program(DIGITS[0], *flags, f"--workdir={workdir}")
    assert "going on from" in done.stderr
    resumed = figures(done)
    assert resumed["curve"] == whole["curve"]
    assert resumed["test_accuracy"] == whole["test_accuracy"]


@pytest.mark.long
def test_recognisers(program, finished, tiny_flags, corpus_dir, tmp_path):
    """A trained model and one at its start: merged, saved, evaluated."""
    trained, _ = finished
    other = tmp_path / "other"
    done = program(
        "experiments.train", *tiny_flags, f"--workdir={other}", "--config.rounds=1", "--json"
    )
    assert done.returncode == 0, done.stderr
    flags = (
        *("experiments.fuse", "--task=asr", f"--models={trained},{other}", f"--data={corpus_dir}"),
        *("--evaluations=6", "--every=3", "--seeds=1", "--population=4", "--json"),
    )
    found = figures(program(*flags, "--method=m2n2,mixing_ratio", f"--workdir={tmp_path}/out"))
    summary = found["methods"]["m2n2"]
    assert len(summary["parents_wer"]) == 2 and summary["average_wer"].keys() == {"test"}
    assert summary["curve"]["evaluations"] == [0, 3, 6]
    scores = summary["curve"]["score"]["mean"]
    assert 0 < scores[0] <= scores[-1] <= 1
    fused = tmp_path / "out" / "fused" / "m2n2"
    assert read_metadata(fused)["stage"] == "fused"
    like = restore_params(trained)
    assert jax.tree.structure(restore_params(fused)) == jax.tree.structure(like)
    rates = figures(
        program("experiments.evaluate", f"--checkpoint={fused}", f"--data={corpus_dir}", "--json")
    )
    assert rates["wer"] == pytest.approx(summary["wer"]["test"]["per_seed"][0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--from_scratch", "--pretrained"), "choose one"),
        (("--method=magic",), "choose from m2n2"),
        (("--task=asr",), "--models and --data"),
    ],
)
def test_mistakes_are_one_line(program, flags, message):
    done = program("experiments.fuse", *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_benchmark_prints_its_figures(program, sklearn):
    done = program(
        "experiments.benchmarks.fusion",
        *("--repeats=1", "--steps=4", "--loop_steps=2", "--seeds=2", "--json"),
    )
    found = figures(done)
    for key in ("bound", "step", "step_no_mutation", "python_loop"):
        assert found[key] > 0
    assert found["parameters"] == 19_210 and found["seeds"]["evaluations_per_second"] > 0
    assert found["share_of_bound"] == pytest.approx(found["step"] / found["bound"])
