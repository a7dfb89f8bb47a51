"""Audits as a program: crafted updates and held-out users."""

import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("jax_privacy", reason="audits need jax-privacy")

pytestmark = pytest.mark.usefixtures("quick_compilation")


KEYS = {
    "epsilon_lower",
    "confidence",
    "epsilon_claimed",
    "delta",
    "method",
    "canaries",
    "trials",
    "rounds",
    "auroc",
    "exceeds",
}
# 68 users of the quickstart, every canary in an eighth of the rounds; claimed: about 1.
NOISY = ("--config.privacy.sigma=0.25", "--delta=1e-3", "--rounds=4", "--trials=40")
# Sets the noise of every mechanism to a tenth, then runs the program.
BROKEN = """
import runpy, sys
from fedasr.privacy.mechanism import Mechanism
stated = Mechanism.noise_std.fget
Mechanism.noise_std = property(lambda self: stated(self) / 10)
sys.argv[0] = "audit_privacy"
runpy.run_module("experiments.audit_privacy", run_name="__main__")
"""


def test_crafted_updates(program, tmp_path):
    plot = tmp_path / "roc.png"
    done = program("experiments.audit_privacy", *NOISY, f"--plot={plot}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= KEYS
    assert 0 <= found["epsilon_lower"] <= found["epsilon_claimed"] < 2
    assert (found["method"], found["canaries"]) == ("one_run", "updates")
    assert (found["trials"], found["rounds"], found["canary_count"]) == (40, 4, 40 * 68)
    assert (found["delta"], found["confidence"], found["exceeds"]) == (1e-3, 0.95, False)
    assert 0.5 < found["auroc"] < 0.7
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_too_little_noise_is_exit_status_1(program_environment):
    command = [sys.executable, "-c", BROKEN, *NOISY, "--method=one_run"]
    done = subprocess.run(
        command, env=program_environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 1, done.stderr
    assert "less privacy than it says" in done.stderr.splitlines()[-1]
    assert "claimed" in done.stdout


@pytest.mark.slow
def test_held_out_users(program, tiny_flags):
    done = program(
        "experiments.audit_privacy",
        *tiny_flags,
        "--canaries=users",
        "--rounds=1",
        "--trials=2",
        "--config.privacy.sigma=0.3",
        "--delta=1e-3",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= KEYS and not found["exceeds"]
    # Two users each of dev and test, in two trainings.
    assert (found["canaries"], found["canary_count"], found["trials"]) == ("users", 8, 2)
    assert found["attack"] == "loss" and 0 <= found["auroc"] <= 1
    assert "run 2/2, round 1" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--canaries=users", "--method=many_runs"), "--trials"),
        (("--canaries=users", "--canary_count=99"), "have 4 users"),
        (("--config.privacy.enabled=False",), "without noise"),
    ],
)
def test_mistakes_are_one_line(program, tiny_flags, flags, message):
    done = program("experiments.audit_privacy", *tiny_flags, *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_canaries(corpus_dir):
    """The inserted transcript is random; a canary's update is exactly zero when it is absent."""
    from experiments.audit_privacy import inserted_losses, make_canaries
    from fedasr.data.batching import LocalBatches
    from fedasr.data.corpus import InMemoryCorpus, open_corpus
    from fedasr.data.sampling import ShuffledSampler
    from fedasr.federated.client import local_training
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import ARRAYS, make_recogniser
    from fedasr.privacy.mechanism import Mechanism

    held_out = open_corpus(corpus_dir, "test")
    canaries = make_canaries(held_out, 2, 30, seed=0)
    assert {c.user for c in canaries} == {f"canary {user}" for user in held_out.users}
    for canary in canaries:
        user = list(held_out.users).index(canary.user.removeprefix("canary "))
        assert len(canary.present) == held_out.sizes[user] + 1
        labels = canary.inserted["labels"]
        assert ((labels >= 1) & (labels < 30)).all() and (np.diff(labels) != 0).all()
        said = [tuple(x["labels"]) for x in canary.present[:-1]]
        assert tuple(labels) not in said and len(labels) in map(len, said)
    again = make_canaries(held_out, 2, 30, seed=0)
    np.testing.assert_array_equal(again[0].inserted["labels"], canaries[0].inserted["labels"])

    options = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16}
    recogniser = make_recogniser("transformer", options)
    params = recogniser.init(jax.random.key(0))
    losses = inserted_losses(jax.jit(recogniser.evaluate), params, canaries)
    assert losses.shape == (2,) and (losses > 0).all()

    def simulated(kinds):
        return Simulation(
            InMemoryCorpus(kinds, ARRAYS),
            Mechanism(1.0, "uniform", 0.0, ShuffledSampler(2, 1, seed=0)),
            local_training(recogniser.loss, optax.sgd(0.5, momentum=0.9)),
            optax.sgd(1.0),
            LocalBatches(2, steps=2),
            devices=jax.devices()[:1],
            keep=ARRAYS,
        )

    kinds = {c.user: c.present for c in canaries}
    everybody = simulated(kinds)
    start = everybody.init(params)
    absent = everybody.draws(start).sampler.cohort(0).item()
    kinds[sorted(kinds)[absent]] = next(
        c.absent for c in canaries if c.user == sorted(kinds)[absent]
    )
    simulation = simulated(kinds)
    assert simulation.draws(start).sampler.cohort(0).item() == absent
    (state, one), (last, two) = simulation.run(start, 2)
    assert one.clients == two.clients == 1
    moved = [
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state.params, other.params))
        for other in (simulation.init(params), last)
    ]
    assert not any(moved[0]) and any(moved[1])
