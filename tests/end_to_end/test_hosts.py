"""Two processes with four devices each are one run, and one does not go on without the other."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fedasr.training.checkpoint import restore_params

LONGEST = 300.0  # seconds that a process may take
SOON = 60.0  # seconds within which it must notice that the other is gone


@pytest.fixture
def start(program_environment):
    """start(flags, processes, last): a run's processes, of four CPU devices or one if alone.

    `last` are more flags of the last process.
    """
    running = []

    def begin(flags, processes, last=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        devices = {"JAX_NUM_CPU_DEVICES": "1" if processes == 1 else "4"}
        for process in range(processes):
            together = (
                f"--coordinator=localhost:{port}",
                f"--processes={processes}",
                f"--process={process}",
            )
            running.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "experiments.train", *flags, "--json"),
                        *(together if processes > 1 else ()),
                        *(last if process == processes - 1 else ()),
                    ],
                    env=program_environment | devices,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return running[-processes:]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def last_round(workdir):
    """The last round that is logged, or -1."""
    metrics = workdir / "metrics.jsonl"
    # Not the seconds of a round, which have a fraction.
    logged = re.findall(r'"round": (\d+),', metrics.read_text()) if metrics.exists() else []
    return max(map(int, logged), default=-1)


def wait_for_round(number, workdir, processes):
    deadline = time.monotonic() + LONGEST
    while last_round(workdir) < number:
        assert processes[0].poll() is None, processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_are_one_run_and_end_together(start, tiny_flags, tmp_path):
    flags = (*tiny_flags, "--config.rounds=9", "--config.checkpoint.every=1")
    flags = (*flags, "--config.cohort=6", "--config.privacy.sampler=everyone")
    flags = (*flags, "--config.evaluation.every=0", "--config.seed_training.steps=0")
    (alone,) = start((*flags, f"--workdir={tmp_path}/alone"), 1)
    both = start((*flags, f"--workdir={tmp_path}/both"), 2)

    # Killed after two rounds: the leader must not wait forever.
    wait_for_round(2, tmp_path / "both", both)
    both[1].send_signal(signal.SIGKILL)
    output, errors = both[0].communicate(timeout=SOON)
    assert both[0].returncode not in (0, None)
    assert "error: another process of this run has ended" in errors or "distributed" in errors
    assert not (tmp_path / "both" / "summary.json").exists()

    # Told to stop, even if not the leader: both save and leave. In a round of their own: earlier,
    # when they meet, nobody listens yet, and the leader would wait for the other in vain.
    done = last_round(tmp_path / "both")
    assert done < 7
    both = start((*flags, f"--workdir={tmp_path}/both"), 2)
    wait_for_round(done + 1, tmp_path / "both", both)
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=SOON) for process in both]
    assert [process.returncode for process in both] == [3, 3], outputs
    assert "resuming in stage 'main' at" in outputs[0][1]

    both = start((*flags, f"--workdir={tmp_path}/both"), 2)
    outputs = [process.communicate(timeout=LONGEST) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "resuming in stage 'main' at" in outputs[0][1]
    assert "status" not in outputs[1][0] and "resuming" not in outputs[1][1]
    summary = json.loads(outputs[0][0].splitlines()[-1])
    assert summary["device"].startswith("8 x ")

    output, errors = alone.communicate(timeout=LONGEST)
    assert alone.returncode == 0, errors
    expected = json.loads(output.splitlines()[-1])
    assert expected["device"].startswith("1 x ")
    assert summary["privacy"] == expected["privacy"]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0),
        restore_params(tmp_path / "both"),
        restore_params(tmp_path / "alone"),
    )


@pytest.mark.slow
def test_processes_with_different_commands_train_nothing(start, tiny_flags, tmp_path):
    flags = (*tiny_flags, f"--workdir={tmp_path}/new")
    both = start(flags, 2, ("--config.client.learning_rate=0.1",))
    outputs = [process.communicate(timeout=LONGEST) for process in both]
    assert all(process.returncode not in (0, None) for process in both), outputs
    assert any("the processes differ in their configuration" in errors for _, errors in outputs)
    assert not (tmp_path / "new" / "config.json").exists()
