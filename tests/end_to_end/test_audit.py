"""Audits as a program: crafted updates and held-out users."""

import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from fedasr.auditing import Audit, Scores
from fedasr.cli.audit import report
from fedasr.cli.audit.report import Report
from fedasr.cli.audit.users import audit_users
from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, PoissonSampler
from fedasr.training.config import default_config, resolve

pytest.importorskip("jax_privacy", reason="audits need jax-privacy")


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


@pytest.mark.slow
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


@pytest.mark.long
def test_side_by_side(program):
    """Both kinds of noise by both methods, in one table and one object."""
    options = ("--rounds=2", "--trials=20", "--runs=60", "--delta=1e-3", "--side_by_side")
    done = program("experiments.audit_privacy", NOISY[0], *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= KEYS
    rows = {(row["noise"], row["method"]): row for row in found["audits"]}
    assert rows.keys() == {
        (noise, method)
        for noise in ("central", "distributed")
        for method in ("one_run", "many_runs")
    }
    first = rows["central", "one_run"]
    assert all(found[key] == first[key] for key in first.keys() - {"exceeds"})
    central, distributed = found["figures"]["central"], found["figures"]["distributed"]
    assert central["accountant"] == "PLD" and distributed["accountant"] == "RDP"
    assert central["epsilon"] < distributed["epsilon"] < 1.01 * central["epsilon_rdp"]
    assert distributed["bits"] == 16 and 0 < distributed["wrapped"] < 1e-8
    for (noise, _), row in rows.items():
        assert row["epsilon_claimed"] == pytest.approx(found["figures"][noise]["epsilon"], rel=0.01)
        assert 0 <= row["epsilon_lower"] <= row["epsilon_claimed"]
    assert rows["distributed", "many_runs"]["trials"] == 60
    assert rows["distributed", "one_run"]["canary_count"] == 20 * 68


def audit_of(noise, method, lower, claimed):
    scores = {"likelihood": Scores(np.ones(2), np.zeros(2))}
    return noise, Audit(
        lower, claimed, lower, 1e-3, 0.95, method, 5, 2, 10, "likelihood", 0.6, scores, {}
    )


def test_the_text_of_a_report():
    figure = {"epsilon": 1.5, "accountant": "PLD", "epsilon_rdp": 2.0}
    figures = {"central": figure, "distributed": figure | {"bits": 12, "wrapped": 1e-9}}
    audits = [
        audit_of("central", "one_run", 0.25, 1.5),
        audit_of("distributed", "one_run", 1.75, 1.5),
        audit_of("central", "many_runs", 0.5, 1.5),
    ]
    lines = list(report.describe(Report(audits, figures, "updates")))
    head, central, distributed = (line.split() for line in lines[-4:-1])
    assert head[-1] == "many_runs" and "one_run" in head
    assert central == ["central", "1.5", "PLD", "2", "0.25", "0.5"]
    assert distributed == [*"distributed 1.5 PLD 2 1.75 (exceeds) not run".split()]
    assert "12 bits" in lines[-1]
    summary = report.to_summary(Report(audits, figures, "updates"))
    assert summary["exceeds"] and not summary["audits"][0]["exceeds"]
    assert summary["epsilon_lower"] == 0.25 and summary["figures"] == figures


def test_noise_in_shares_that_cannot_be_is_explained():
    fixed = Mechanism(1.0, "global", 2.0, FixedSizeSampler(100, 10, seed=0))
    noises = report.both_noises(fixed, 16, 1000)
    assert noises["central"] is fixed and "'shuffled'" in noises["distributed"]
    figure = report.figure_of(noises["distributed"], 3, 1e-5)
    assert figure["epsilon"] is None and "'shuffled'" in figure["why_not"]
    lines = list(
        report.describe(
            Report([audit_of("central", "one_run", 0.1, 1.5)], {"distributed": figure}, "updates")
        )
    )
    assert "'shuffled'" in lines[-1]
    poisson = Mechanism(1.0, "global", 2.0, PoissonSampler(100, 10, seed=0))
    both = report.both_noises(poisson, 14, 1000)
    assert both["distributed"].secure.bits == 14
    again = report.both_noises(both["distributed"], 20, 1)
    assert again["distributed"] is both["distributed"] and again["central"] == poisson


@pytest.fixture(scope="module")
def few_people(tmp_path_factory):
    """Two training users and a held-out one, an utterance of noise each."""
    pytest.importorskip("array_record")
    pytest.importorskip("tensorflow_datasets")
    utterances = [
        Utterance(
            user,
            user,
            "one two",
            split,
            lambda i=i: (0.1 * np.random.default_rng(i).standard_normal(8_000, np.float32), 16_000),
        )
        for i, (user, split) in enumerate((("a", "train"), ("b", "train"), ("c", "dev")))
    ]
    out = tmp_path_factory.mktemp("people") / "data"
    prepare(utterances, out, name="people")
    return out


def audit_people(directory, trials, **privacy):
    config = default_config()
    config.data.dir, config.data.eval = str(directory), ("dev",)
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    config.update(rounds=2, cohort=3)
    config.client.update(steps=10, batch_size=2, learning_rate=0.5)
    config.server.update(optimizer="sgd", learning_rate=3.0)
    config.privacy.update(
        sampler="shuffled", clip_norm=5.0, budget="global", sigma=1.0, delta=1e-3, deployments=()
    )
    config.privacy.update(privacy)
    options = {"trials": trials, "canaries": None, "confidence": 0.95, "log": lambda text: None}
    plain = resolve(config.to_dict())
    return audit_users(plain, 1e-3, method="many_runs", **options)


@pytest.mark.long
def test_a_held_out_user_is_recognised_when_there_is_no_noise(few_people, monkeypatch):
    """The attack on real users works: their own utterance, with random words, is learned."""
    monkeypatch.setattr(Mechanism, "noise_std", property(lambda self: 0.0))
    found, mechanism = audit_people(few_people, 4)
    assert found.auroc == 1 and found.canaries == found.trials == 4
    scores = found.scores["loss"]
    assert scores.present.min() > 3 > 0 > scores.absent.max()
    assert 1 < found.epsilon_claimed < 2 and mechanism.sampler.population == 3


@pytest.mark.long
def test_a_held_out_user_is_hidden_by_shares_of_noise(few_people):
    found, mechanism = audit_people(few_people, 2, noise="skellam")
    assert mechanism.secure.dimension > 10_000
    assert not found.exceeds and found.epsilon_claimed > 1
    assert np.isfinite(found.scores["loss"].present).all()


@pytest.mark.slow
def test_too_little_noise_is_exit_status_1(program_environment):
    command = [sys.executable, "-c", BROKEN, *NOISY, "--method=one_run"]
    done = subprocess.run(
        command, env=program_environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 1, done.stderr
    assert "less privacy than it says" in done.stderr.splitlines()[-1]
    assert "claimed" in done.stdout


@pytest.mark.long
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
    from fedasr.cli.audit.users import inserted_losses, make_canaries
    from fedasr.data.batching import Batching
    from fedasr.data.corpus import InMemoryCorpus
    from fedasr.data.records import open_corpus
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import ARRAYS, make_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import ShuffledSampler

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
            FedAvg(local_training(recogniser.loss, optax.sgd(0.5, momentum=0.9)), optax.sgd(1.0)),
            Batching(2, steps=2, select=ARRAYS),
            hardware=Hardware(jax.devices()[:1]),
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
