"""kill -9 at random moments: the run that is resumed ends as if nothing had happened."""

import json
import multiprocessing
import os
import random
import time

import jax
import numpy as np
import pytest

from fedasr.data.records import open_corpus
from fedasr.federated.local import LocalStore
from fedasr.training import loop
from fedasr.training.builders import models
from fedasr.training.checkpoint import restore_params
from fedasr.training.config import Config
from fedasr.training.logging import read_metrics

KILLS = 10
LONGEST = 300.0  # seconds that a process may take

# When to kill, counted from what is seen of the run: (what, longest random delay in seconds).
MOMENTS = {
    "start": 4.0,  # data, tracing, restoring
    "metrics": 0.1,  # a step of the seed, a round
    "checkpoint": 0.1,  # a save begins, or is complete
    "end": 1.5,  # last evaluation, summary, report
}


@pytest.fixture
def start(monkeypatch):
    """start(config, workdir): `loop.run` in a fresh process, forked from one that has imported."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(len(os.sched_getaffinity(0))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedasr.training.loop", "orbax.checkpoint", "tensorboardX"])
    processes = []

    def begin(config, workdir):
        process = context.Process(target=loop.run, args=(config, workdir))
        process.start()
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.join()


def look(workdir, what):
    """Something that changes when `what` happens in the work directory."""
    if what == "metrics":
        path = workdir / "metrics.jsonl"
        return path.stat().st_size if path.exists() else None
    if what == "checkpoint":
        folder = workdir / "checkpoints"
        return {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    metrics = workdir / "metrics.jsonl"
    return (workdir / "summary.json").exists() or (
        metrics.exists() and '"round": 6,' in metrics.read_text()
    )


def kill_at(process, workdir, what, delay):
    """Kills the process `delay` after `what` happens; False if it had ended before."""
    deadline = time.monotonic() + LONGEST
    if what != "start":
        before = look(workdir, what)
        while process.is_alive() and time.monotonic() < deadline:
            if look(workdir, what) != before or (what == "end" and before):
                break
            time.sleep(0.001)
    process.join(delay)
    process.kill()
    process.join()
    return process.exitcode != 0


@pytest.mark.slow
def test_killed_runs_end_as_the_uninterrupted_one(finished, start, tmp_path):
    whole, stdout = finished
    reference = json.loads(stdout)
    config = json.loads((whole / "config.json").read_text())
    params = restore_params(whole)
    rng = random.Random(0)
    kills, kills_after_start, runs = 0, 0, 0
    while kills < KILLS:
        assert runs < 2 * KILLS, "the runs end before they are killed"
        runs += 1
        workdir = tmp_path / str(runs)
        exitcode = None
        while exitcode != 0:
            process = start(config, workdir)
            if kills < KILLS:
                what = rng.choice(list(MOMENTS))
                killed = kill_at(process, workdir, what, rng.uniform(0, MOMENTS[what]))
                kills += killed
                kills_after_start += killed and (workdir / "metrics.jsonl").exists()
            else:
                process.join(LONGEST)
            exitcode = process.exitcode
            assert exitcode in (0, -9), f"the process failed with {exitcode}"

        jax.tree.map(np.testing.assert_array_equal, restore_params(workdir), params)
        assert losses(workdir) == losses(whole)
        assert (workdir / "report.html").exists()
        summary = json.loads((workdir / "summary.json").read_text())
        for key in reference.keys() - {"wall_seconds", "client_steps_per_second"}:
            assert summary[key] == reference[key], key
    assert kills_after_start >= KILLS // 2


@pytest.mark.long
def test_killed_runs_lose_no_local_parameters(finished, start, tmp_path):
    config = json.loads((finished[0] / "config.json").read_text())
    config["model"]["options"]["input_layer"] = True
    config["local"]["patterns"] = ["^input_layer/"]
    config["seed_training"]["steps"] = 0
    config["data"]["eval"] = []
    config["rounds"], config["checkpoint"]["every"] = 5, 2  # a killed round is lost, or two
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(config, whole)
    process.join(LONGEST)
    assert process.exitcode == 0
    rng = random.Random(1)
    kills = 0
    while process.exitcode != 0 or not kills:
        process = start(config, killed)
        if kills < 3:
            kills += kill_at(process, killed, "metrics", rng.uniform(0, MOMENTS["metrics"]))
        else:
            process.join(LONGEST)
    assert kills == 3
    jax.tree.map(np.testing.assert_array_equal, restore_params(killed), restore_params(whole))
    assert losses(killed) == losses(whole)
    np.testing.assert_array_equal(*(rows(config, workdir) for workdir in (killed, whole)))


def rows(config, workdir):
    """The users' local parameters at the end of a run."""
    layout = models.local_layout(Config.of(config))
    users = len(open_corpus(config["data"]["dir"], config["data"]["train"]).users)
    with LocalStore(workdir / "local", layout, users, read_only=True) as store:
        store.restore(config["rounds"])
        assert store.known.sum() >= 2
        return store.gather(np.flatnonzero(store.known), np.zeros(layout.size, np.float32))


def losses(workdir):
    """(phase, number, loss) of every record, in the order of the file."""
    return [
        (record["phase"], record.get("round", record.get("step")), record.get("loss"))
        for record in read_metrics(workdir)
    ]
