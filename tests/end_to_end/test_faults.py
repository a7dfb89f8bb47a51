"""Faults of disks and paths, as a user of experiments.train meets them."""

import contextlib
import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

from fedasr.training.checkpoint import restore_params
from fedasr.training.logging import read_metrics


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own, which takes root."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def errors_of(done):
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.long
def test_a_full_disk_for_events_is_a_warning(program, finished, tiny_flags, tmp_path):
    with small_disk(tmp_path / "run" / "tensorboard", "8k"):
        done = program("experiments.train", *tiny_flags, f"--workdir={tmp_path}/run", "--json")
    assert done.returncode == 0 and not errors_of(done)
    summary = json.loads(done.stdout)
    assert "No space left" in summary["side_channel_failures"]["TensorBoard"]
    assert done.stderr.count("warning: TensorBoard") == 1
    params = restore_params(finished[0])
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "run"), params)


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(
    program, finished, tiny_flags, tmp_path
):
    workdir = tmp_path / "disk" / "run"
    command = ("experiments.train", *tiny_flags, f"--workdir={workdir}", "--json")
    with small_disk(tmp_path / "disk", "1m"):
        filler = tmp_path / "disk" / "filler"
        filler.write_bytes(bytes(300_000))
        done = program(*command)
        assert done.returncode == 2, done.stderr
        (line,) = errors_of(done)
        assert "No space left" in line and "the same command goes on" in line
        before = {p.name for p in (workdir / "checkpoints").iterdir()}
        again = program(*command)
        assert again.returncode == 2 and len(errors_of(again)) == 1
        filler.unlink()
        (tmp_path / "disk" / "more").mkdir()
        subprocess.run(["mount", "-o", "remount,size=16m", str(tmp_path / "disk")], check=True)
        assert {p.name for p in (workdir / "checkpoints").iterdir()} >= before
        last = program(*command)
        assert last.returncode == 0, last.stderr
        params = restore_params(finished[0])
        jax.tree.map(np.testing.assert_array_equal, restore_params(workdir), params)
        rounds = [r["round"] for r in read_metrics(workdir) if "round" in r]
        assert rounds == sorted(set(rounds))


@pytest.mark.slow
def test_a_run_in_a_path_full_of_patterns(program, finished, tiny_flags, corpus_dir, tmp_path):
    workdir = tmp_path / "case[1] \\ ä*"
    shutil.copytree(finished[0], workdir)
    rates = program(
        "experiments.evaluate", f"--checkpoint={workdir}", f"--data={corpus_dir}", "--json"
    )
    assert json.loads(rates.stdout)["wer"] == json.loads(finished[1])["wer"]["test"]
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "10")
    done = program("experiments.train", *tiny_flags, f"--workdir={workdir}", "--json")
    assert done.returncode == 0, done.stderr
    params = restore_params(finished[0])
    jax.tree.map(np.testing.assert_array_equal, restore_params(workdir), params)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.client.learning_rate=nan", "client.learning_rate=nan must be a finite number"),
        ("--config.privacy.sigma=inf", "privacy.sigma=inf must be a finite number"),
        ("--config.server.learning_rate=-1.0", "server.learning_rate=-1.0 must be at least 0"),
        ("--config.evaluation.while_training=('tset',)", "there is no split 'tset'"),
        ("--config.rounds=1000000000000", "rounds=1000000000000 must be at most"),
        ("--extend=9", "holds no run yet"),
    ],
)
def test_nonsense_is_refused_by_run_and_dry_run(program, tiny_flags, tmp_path, flag, words):
    for extra in ("--dry_run", "--nodry_run"):
        workdir = f"--workdir={tmp_path}/run"
        done = program("experiments.train", *tiny_flags, flag, extra, workdir, "--json")
        assert done.returncode == 2 and done.stdout == ""
        (line,) = errors_of(done)
        assert words in line
    assert not (tmp_path / "run" / "config.json").exists()
