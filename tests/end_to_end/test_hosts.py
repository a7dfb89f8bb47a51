"""Two processes are one run, and one does not go on without the other; here and on two hosts.

The hosts are network namespaces of this one: processes are killed there, a host is cut off, the
link is slow and the clocks differ. What is left ends within a minute and in one line, and the same
commands go on.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fedasr.federated.local import LocalStore
from fedasr.training.checkpoint import restore_params

LONGEST = 300.0  # seconds that a process may take
SOON = 60.0  # seconds within which it must notice that the other is gone


@pytest.fixture
def start(program_environment):
    """start(flags, processes, last): a run's processes, of four CPU devices or one if alone.

    `last` are more flags of the last process, `each` the devices of one of several.
    """
    running = []

    def begin(flags, processes, last=(), each=4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        devices = {"JAX_NUM_CPU_DEVICES": "1" if processes == 1 else str(each)}
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


def alike(one, other):
    """Sums in another order leave parameters so close."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0),
        restore_params(one),
        restore_params(other),
    )


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
    assert "error: another process of this run has ended" in errors
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
    alike(tmp_path / "both", tmp_path / "alone")

    # The last round again, by fewer processes and by more: as close, and said.
    names = {"alone": "1 x cpu", "both": "8 x cpu in 2 processes"}
    for name, other, processes in (("alone", "both", 2), ("both", "alone", 1)):
        folder = tmp_path / f"{name} by {processes}"
        shutil.copytree(tmp_path / name, folder)
        (folder / "summary.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "9")
        them = start((*flags, f"--workdir={folder}"), processes)
        outputs = [process.communicate(timeout=LONGEST) for process in them]
        assert [process.returncode for process in them] == [0] * processes, outputs
        change = f"{names[name]} -> {names[other]}"
        assert f"at 8 with {change}: sums are in another order" in outputs[0][1]
        summary = json.loads(outputs[0][0].splitlines()[-1])
        assert summary["device_changes"] == [f"{change} at 8"]
        alike(folder, tmp_path / "alone")


def rows_after(rounds, workdir):
    """The local parameters of all users, float32 [users, size]."""
    size, users = np.fromfile(workdir / "local" / "slots.i64", np.int64)[:2]
    layout = SimpleNamespace(size=int(size))
    with LocalStore(workdir / "local", layout, int(users), read_only=True) as store:
        store.restore(rounds)
        assert store.known.all()
        return store.gather(np.arange(users), np.zeros(size, np.float32))


ROWS = ("--config.local.patterns=('output',)", "--config.cohort=6")
ROWS = (*ROWS, "--config.privacy.sampler=everyone", "--config.rounds=4")
KINDS = {
    "local parameters": ROWS,
    "central": ("--config.algorithm=central", "--config.central.steps=4"),
    "central with local parameters": (
        "--config.algorithm=central",
        "--config.central.steps=4",
        "--config.local.patterns=('output',)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_users_keep_and_central_training_take_two_processes(start, tiny_flags, tmp_path, kind):
    flags = (*tiny_flags, *KINDS[kind], "--config.seed_training.steps=0")
    flags = (*flags, "--config.checkpoint.seed_every=2", "--config.central.batch_size=4")
    flags = (*flags, "--config.evaluation.every=0")
    (alone,) = start((*flags, f"--workdir={tmp_path}/alone"), 1)
    output, errors = alone.communicate(timeout=LONGEST)
    assert alone.returncode == 0, errors
    for resumed in (False, True):  # from the checkpoint in the middle
        if resumed:
            (tmp_path / "both" / "summary.json").unlink()
            shutil.rmtree(tmp_path / "both" / "checkpoints" / "4")
        both = start((*flags, f"--workdir={tmp_path}/both"), 2, each=1)
        outputs = [process.communicate(timeout=LONGEST) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert ("at 2, exactly: on 2 x cpu in 2 processes" in outputs[0][1]) == resumed
        summary, expected = (json.loads(x.splitlines()[-1]) for x in (outputs[0][0], output))
        for name in ("rounds", "central_steps", "client_updates", "local"):
            assert summary[name] == expected[name], name
        alike(tmp_path / "both", tmp_path / "alone")
        if "local" in kind:
            rows = [rows_after(4, tmp_path / name) for name in ("both", "alone")]
            np.testing.assert_allclose(*rows, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_processes_with_different_commands_train_nothing(start, tiny_flags, tmp_path):
    flags = (*tiny_flags, f"--workdir={tmp_path}/new")
    both = start(flags, 2, ("--config.client.learning_rate=0.1",))
    outputs = [process.communicate(timeout=LONGEST) for process in both]
    assert all(process.returncode not in (0, None) for process in both), outputs
    assert any("the processes differ in their configuration" in errors for _, errors in outputs)
    assert not (tmp_path / "new" / "config.json").exists()


PORT = 23_456  # the namespaces are new: nothing else listens there
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SKEW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t which, struct timespec *now) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int wrong = real(which, now);
  if (!wrong && which == CLOCK_REALTIME) now->tv_sec += 86400;
  return wrong;
}
"""


def call(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def namespaces():
    """Names of two network namespaces that a cable connects, at 4 Mbit/s."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces take root and iproute2")
    names = [f"fedasr-{os.getpid()}-{side}" for side in "ab"]
    with contextlib.ExitStack() as stack:

        def undo(*command):
            stack.callback(subprocess.run, command, capture_output=True, check=False)

        try:
            for name, address in zip(names, ADDRESSES, strict=True):
                undo("ip", "netns", "del", name)
                call("ip", "netns", "add", name)
                call("ip", "-n", name, "link", "set", "lo", "up")
                # What this host's name means there: JAX's processes find each other by it.
                folder = Path("/etc/netns") / name
                folder.mkdir(parents=True)
                stack.callback(shutil.rmtree, folder)
                (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {os.uname()[1]}\n")
            cable = ("ip", "link", "add", "cable", "netns", names[0], "type", "veth")
            call(*cable, "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                call("ip", "-n", name, "link", "set", "cable", "up")
                slow = ("root", "tbf", "rate", "4mbit", "burst", "32kbit", "latency", "400ms")
                call("tc", "-n", name, "qdisc", "add", "dev", "cable", *slow)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield names


@pytest.fixture
def start_on_hosts(namespaces, program_environment, tmp_path):
    """start_on_hosts(flags): a process on each host; the second's clock is a day off."""
    skew = tmp_path / "skew.so"
    compile_skew = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(skew), "-", "-ldl"]
    made = (
        shutil.which("cc")
        and not subprocess.run(
            compile_skew, input=SKEW, text=True, check=False, capture_output=True
        ).returncode
    )
    running = []

    def begin(flags):
        for process, name in enumerate(namespaces):
            clock = {"LD_PRELOAD": str(skew)} if made and process else {}
            running.append(
                subprocess.Popen(
                    [
                        *("ip", "netns", "exec", name),
                        *(sys.executable, "-m", "experiments.train", *flags, "--json"),
                        f"--coordinator={ADDRESSES[0]}:{PORT}",
                        *("--processes=2", f"--process={process}"),
                    ],
                    env=program_environment | {"JAX_NUM_CPU_DEVICES": "2"} | clock,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return running[-2:]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def ends_in_one_line(process):
    output, errors = process.communicate(timeout=SOON)
    assert process.returncode == 1 and "status" not in output, (process.returncode, errors)
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "another process of this run has ended" in told[0], errors
    assert "start the same commands again" in told[0]
    for word in ("Traceback", "coordination_service", "***", "terminate called", "Source Location"):
        assert word not in errors, errors


@pytest.mark.long
def test_two_hosts_survive_kills_and_cuts_of_a_slow_link(
    start_on_hosts, namespaces, tiny_flags, tmp_path
):
    workdir = tmp_path / "run"
    flags = (*tiny_flags, "--config.rounds=12", "--config.checkpoint.every=1")
    flags = (*flags, "--config.cohort=6", "--config.privacy.sampler=everyone")
    flags = (*flags, "--config.evaluation.every=0", "--config.seed_training.steps=0")
    flags = (*flags, "--config.data.eval=()", "--config.evaluation.while_training=()")
    flags = (*flags, f"--workdir={workdir}")

    for victim in (1, 0):  # the leader, too
        done = last_round(workdir)
        both = start_on_hosts(flags)
        wait_for_round(done + 1, workdir, both)
        both[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        ends_in_one_line(both[1 - victim])
        assert time.monotonic() - began < SOON

    done = last_round(workdir)
    both = start_on_hosts(flags)
    wait_for_round(done + 1, workdir, both)
    call("ip", "-n", namespaces[1], "link", "set", "cable", "down")
    began = time.monotonic()
    for process in both:
        ends_in_one_line(process)
    assert time.monotonic() - began < SOON
    call("ip", "-n", namespaces[1], "link", "set", "cable", "up")
    assert last_round(workdir) < 12, "the run had ended before all has been tried"

    both = start_on_hosts(flags)
    outputs = [process.communicate(timeout=LONGEST) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    summary = json.loads(outputs[0][0].splitlines()[-1])
    assert summary["rounds"] == 12 and summary["device_changes"] == []

    # Left alone, the two come to the same, bit for bit.
    whole = (*flags[:-1], f"--workdir={tmp_path}/whole")
    both = start_on_hosts(whole)
    outputs = [process.communicate(timeout=LONGEST) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    jax.tree.map(
        np.testing.assert_array_equal, restore_params(workdir), restore_params(tmp_path / "whole")
    )
