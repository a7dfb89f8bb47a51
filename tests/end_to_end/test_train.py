"""The command-line contract of experiments.train and experiments.evaluate."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fedasr.training.checkpoint import restore_params
from fedasr.training.logging import read_metrics

SUMMARY = {
    "status",
    "rounds",
    "cohort",
    "population",
    "parameters",
    "wer",
    "cer",
    "initial_wer",
    "privacy",
    "client_steps_per_second",
    "padding_fraction",
    "skipped_utterances",
    "invalid_client_updates",
    "wall_seconds",
    "device",
}
PRIVACY = {
    "clip_norm",
    "budget",
    "sigma",
    "noise_multiplier",
    "sampling",
    "epsilon",
    "delta",
    "accountant",
    "extrapolations",
}


def one_json_line(stdout: str) -> dict:
    assert stdout.count("\n") == 1, stdout
    return json.loads(stdout)


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return one_json_line(done.stdout)


def one_line_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    return errors[0]


def test_summary_has_the_promised_keys(finished):
    summary = one_json_line(finished[1])
    assert SUMMARY <= summary.keys()
    assert PRIVACY <= summary["privacy"].keys()
    assert summary["status"] == "completed"
    assert (summary["rounds"], summary["cohort"], summary["population"]) == (6, 3, 6)
    for rates in ("wer", "cer", "initial_wer"):
        assert summary[rates].keys() == {"dev", "test"}
    (deployment,) = summary["privacy"]["extrapolations"]
    assert {"cohort", "population", "rounds", "epsilon"} <= deployment.keys()
    assert (deployment["cohort"], deployment["population"]) == (1024, 1_000_000)
    assert summary["skipped_utterances"] == {}
    assert summary["invalid_client_updates"] == 0


def test_work_directory_holds_the_promised_files(finished, corpus_dir):
    workdir, stdout = finished
    written = json.loads((workdir / "summary.json").read_text())
    assert written == one_json_line(stdout) | {"check": written["check"]}
    config = json.loads((workdir / "config.json").read_text())
    assert config["rounds"] == 6 and config["data"]["dir"] == str(corpus_dir)
    records = read_metrics(workdir)
    assert [r["round"] for r in records if r["phase"] == "federated"] == list(range(7))
    assert [r["step"] for r in records if r["phase"] == "seed"] == [2, 4]
    assert [r["round"] for r in records if "eval" in r] == [0, 3, 6]
    assert list((workdir / "tensorboard").rglob("*tfevents*"))
    steps = sorted(int(f.name) for f in (workdir / "checkpoints").iterdir())
    assert steps == [8, 10]  # 4 steps of the seed, then rounds 4 and 6
    leaves = jax.tree.leaves(restore_params(workdir))
    assert sum(leaf.size for leaf in leaves) == one_json_line(stdout)["parameters"]


def test_report_is_self_contained(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in page
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)


def test_same_command_again_returns_the_same_summary(program, finished, tiny_flags):
    workdir, stdout = finished
    before = (workdir / "metrics.jsonl").read_text()
    again = program("experiments.train", *tiny_flags, f"--workdir={workdir}", "--json")
    assert again.stdout == stdout
    assert again.returncode == 0
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused(program, finished, tiny_flags):
    workdir, _ = finished
    done = program(
        "experiments.train", *tiny_flags, "--config.seed=1", f"--workdir={workdir}", "--json"
    )
    error = one_line_error(done)
    assert "differs in seed" in error and "another directory" in error


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.no_such_field=1", "no_such_field"),
        ("--config.rounds=many", "rounds"),
        ("--config=no_such_file.py", "no_such_file.py"),
        ("--config.data.dir=no_such_folder", "no_such_folder"),
        ("rounds=3", "--name=value"),
        ("--config.init_from=nothing://bucket/run", "no file system is known by that name"),
        ("--config.data.dir=gs://bucket/data", "mount the bucket"),
        ("--config.init_from=no/such/run", "no checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(program, tmp_path, flag, words):
    done = program("experiments.train", flag, f"--workdir={tmp_path / 'run'}", "--json")
    assert words in one_line_error(done)
    assert not (tmp_path / "run" / "config.json").exists()


def test_dry_run_knows_the_run_and_writes_nothing(program, finished, tiny_flags, tmp_path):
    whole = one_json_line(finished[1])
    done = program("experiments.train", *tiny_flags, "--dry_run", "--json", cwd=tmp_path)
    dry = result(done)
    assert list(tmp_path.iterdir()) == []
    for key in ("rounds", "cohort", "population", "parameters", "privacy"):
        assert dry[key] == whole[key]
    assert dry["status"] == "dry_run"
    assert dry["chunk"] == 1
    four_bytes_each = 4 * whole["parameters"]
    assert dry["bytes_per_client"] == {"down": four_bytes_each, "up": four_bytes_each}


def test_evaluate_agrees_with_the_summary(program, finished, corpus_dir):
    workdir, stdout = finished
    summary = one_json_line(stdout)
    rates = result(
        program(
            "experiments.evaluate",
            f"--checkpoint={workdir}",
            f"--data={corpus_dir}",
            "--split=test",
            "--json",
        )
    )
    assert rates["wer"] == summary["wer"]["test"]
    assert rates["cer"] == summary["cer"]["test"]
    assert (rates["utterances"], rates["users"], rates["rounds"]) == (6, 2, 6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_resumable_run(
    program, program_environment, finished, tiny_flags, tmp_path, number
):
    """SIGTERM after round 1 (SIGINT in the seed): status 3, then a bit-identical end."""
    flags = [*tiny_flags, f"--workdir={tmp_path}", "--json"]
    command = [sys.executable, "-m", "experiments.train", *flags]
    ready = '"round": 1' if number == signal.SIGTERM else '"step": 2'
    with subprocess.Popen(
        command, env=program_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and ready in metrics.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        os.kill(process.pid, number)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 3, errors
    assert output == ""
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"
    assert len(read_metrics(tmp_path)) < len(read_metrics(finished[0]))

    resumed = result(program("experiments.train", *flags))
    whole = one_json_line(finished[1])
    for key in ("wer", "cer", "initial_wer", "privacy", "padding_fraction", "rounds"):
        assert resumed[key] == whole[key]
    jax.tree.map(
        np.testing.assert_array_equal, restore_params(tmp_path), restore_params(finished[0])
    )
    losses = [(r["phase"], r.get("round", r.get("step")), r["loss"]) for r in records(tmp_path)]
    assert losses == [
        (r["phase"], r.get("round", r.get("step")), r["loss"]) for r in records(finished[0])
    ]


def records(workdir):
    return [record for record in read_metrics(workdir) if "loss" in record]
