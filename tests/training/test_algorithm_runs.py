"""Runs of algorithms that remember, exchange or wait: configuration, checkpoints, evaluation."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.training import loop, rows, selection, stages
from fedasr.training.builders import algorithms, corpora, models, whole
from fedasr.training.checkpoint import read_metadata, restore_params
from fedasr.training.config import default_config
from fedasr.training.logging import read_metrics, to_json
from fedasr.training.session import Interrupted

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    """Noise: 6 training users with 2 utterances each, 1 user each of dev and test."""

    def noise(number):
        return 0.1 * np.random.default_rng(number).standard_normal(6_000, np.float32), 16_000

    utterances = [
        Utterance(f"{split}-{user}-{i}", f"{split}-{user}", "one", split, lambda i=i: noise(i))
        for split, users in {"train": 6, "dev": 1, "test": 1}.items()
        for user in range(users)
        for i in range(2)
    ]
    out = tmp_path_factory.mktemp("algorithms") / "data"
    prepare(utterances, out, name="noise")
    return out


def configured(corpus_dir, algorithm, options, changes=None):
    config = default_config()
    config.data.dir = str(corpus_dir)
    config.model.options.update(dim=8, blocks=1, heads=1, mlp=8)
    config.algorithm = algorithm
    config.algorithm_options.update(options)
    config.update(rounds=4, cohort=2)
    config.client.update(steps=2, batch_size=2)
    config.server.update(optimizer="sgd", learning_rate=1.0)
    config.seed_training.steps = 0
    config.privacy.update(enabled=False, sampler="fixed")
    config.evaluation.update(every=0, batch_size=2)
    config.checkpoint.every = 2
    config.update_from_flattened_dict(changes or {})
    return to_json(config.to_dict())


DEVICES = {
    "participation.enabled": True,
    "participation.spread": 1.0,
    "participation.deadline": 4.0,
    "participation.dropout_after": 0.3,
}
ON = {"participation.enabled": True}
APART = {"data.skew": "voices", "data.skew_alpha": 0.5}
QUEUE = ON | {"privacy.sampler": "asynchronous"}
SKELLAM = {"privacy.enabled": True, "privacy.noise": "skellam", "privacy.sampler": "poisson"}
RUNS = {
    "scaffold": ("scaffold", {}, DEVICES),
    "ditto": ("ditto", {"attraction": 0.01}, {"data.eval": ("train", "test")}),
    "fedbuff": (
        "fedbuff",
        {"versions": 4},
        {
            "privacy.sampler": "asynchronous",
            "participation.enabled": True,
            "participation.spread": 1.0,
            "participation.concurrency": 4,
        },
    ),
}


def stopping(monkeypatch):
    """Runs are asked to stop after their second round."""
    asked = []

    class Stop:
        @property
        def requested(self):
            asked.append(0)
            return len(asked) == 2

    @contextlib.contextmanager
    def stop():
        yield Stop()

    monkeypatch.setattr(loop, "graceful_stop", stop)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_stops_and_goes_on_to_the_same_end(name, corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)
    algorithm, options, changes = RUNS[name]
    config = configured(corpus_dir, algorithm, options, changes)
    summary = loop.run(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch)
        with pytest.raises(Interrupted, match="stopped in main at 2"):
            loop.run(config, tmp_path / "cut")
    again = loop.run(config, tmp_path / "cut")
    params = [restore_params(tmp_path / place) for place in ("whole", "cut")]
    for one, other in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert summary["wer"] == again["wer"] and summary["status"] == "completed"
    assert summary["simulated_seconds"] == again["simulated_seconds"]
    if name != "ditto":
        records = read_metrics(tmp_path / "cut")
        clocks = [r["participation"]["clock"] for r in records if "participation" in r]
        assert len(clocks) == 4 and np.diff(clocks).min() >= 0
        assert clocks[-1] == summary["simulated_seconds"] > 0
    if name == "scaffold":
        assert summary["memory"]["users"] > 2
        own, plain = summary["clients"][-1], summary["clients"][0]
        assert own["up_bytes"] == 2 * plain["up_bytes"]
        assert own["down_bytes"] == 2 * plain["down_bytes"]
    if name == "ditto":
        # Whom the run knows are evaluated with models of their own, others with the common one.
        train, test = (open_corpus(corpus_dir, split) for split in ("train", "test"))
        layout, rows_of = rows.local_rows(tmp_path / "cut", params[0], train, corpus_dir)
        models = [layout.insert(params[0], row) for row in rows_of(np.arange(6))]
        apart = [max(map(largest, *map(jax.tree.leaves, (m, params[0])))) for m in models]
        assert sum(x > 0 for x in apart) == summary["memory"]["users"] > 2
        _, rows_of = rows.local_rows(tmp_path / "cut", params[0], test, corpus_dir)
        own = layout.insert(params[0], rows_of(np.arange(1))[0])
        assert max(map(largest, *map(jax.tree.leaves, (own, params[0])))) == 0


# All that remember something of users, or keep something beside the model.
REMEMBER = RUNS | {
    "feddyn": ("feddyn", {"alpha": 0.1}, DEVICES),
    "fedrep": ("fedrep", {}, {"local.patterns": ("^input_layer/",)}),
    "mimelite": ("mimelite", {"momentum": 0.9}, {}),
    "pfedme": ("pfedme", {"attraction": 0.1, "rate": 1.0}, {"data.eval": ("train", "test")}),
    "private scaffold": ("scaffold", {}, {"privacy.enabled": True, "privacy.sampler": "poisson"}),
}
# Runs in a process of its own, which dies after its third round, one after the last checkpoint.
KILLED = """
import os, pickle, signal, sys, time
from fedasr.training import loop, session, stages

def fall(self, units, record, state):
    if units == 3:
        time.sleep(3)  # the checkpoint is written meanwhile
        os.kill(os.getpid(), signal.SIGKILL)

session.Session.evaluated = fall
stages.write_report = lambda workdir: None
with open(sys.argv[1], "rb") as file:
    loop.run(pickle.load(file), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEMBER)
def test_a_run_that_is_killed_goes_on_to_the_same_end(name, corpus_dir, tmp_path, monkeypatch):
    """By kill -9, with rows of users that are newer than the checkpoint."""
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)
    algorithm, options, changes = REMEMBER[name]
    seeds = {"privacy.noise_seed": "run"}  # a secret one is another in each run
    config = configured(corpus_dir, algorithm, options, changes | seeds)
    if algorithm == "fedrep":
        config["model"]["options"]["input_layer"] = True
    summary = loop.run(config, tmp_path / "whole")
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", KILLED, tmp_path / "config", tmp_path / "cut"]
    devices = f"--xla_force_host_platform_device_count={jax.device_count()}"
    died = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"XLA_FLAGS": devices},
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert read_metadata(tmp_path / "cut")["units"] == 2
    again = loop.run(config, tmp_path / "cut")
    params = [restore_params(tmp_path / place) for place in ("whole", "cut")]
    for one, other in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert summary["wer"] == again["wer"] and summary["status"] == "completed"
    kept = [read_metadata(tmp_path / place) for place in ("whole", "cut")]
    for what in ("local_users", "local_rows"):  # the latter is a digest of all rows
        assert kept[0].get(what) == kept[1].get(what)
    remembers = algorithm not in ("fedbuff", "mimelite")  # these, beside the model alone
    assert (kept[0].get("local_users", 0) > 2) == remembers


def largest(one, other):
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@pytest.mark.parametrize(
    ("algorithm", "options", "changes", "message"),
    [
        ("scaffold", {"alpha": 1.0}, {}, "algorithm_options has 'alpha'.*takes share, unit"),
        ("central", {"alpha": 1.0}, {}, "algorithm_options are of federated algorithms"),
        ("scaffold", {}, {"local.patterns": ("output",)}, "unset local.patterns"),
        ("scaffold", {}, {"local.prototype": "mean"}, "begins empty"),
        ("scaffold", {}, {"compression.upload": "S1E3M7"}, "unset compression"),
        ("scaffold", {}, {"partial.mode": "round"}, "partial.mode='all' or 'fixed'"),
        ("ditto", {}, {"selection.split": "dev"}, "remembers users"),
        ("fedexp", {}, {"privacy.enabled": True}, "without privacy only"),
        ("fednova", {}, {"privacy.enabled": True}, "steps to a public number"),
        ("mimelite", {}, SKELLAM, "privacy.noise='skellam' has no room"),
        ("fedbuff", {}, {}, "belong together"),
        ("federated", {}, {"privacy.sampler": "asynchronous"}, "belong together"),
        ("fedbuff", {}, QUEUE | {"participation.deadline": 1.0}, "deadline is of rounds"),
        ("fedbuff", {}, QUEUE | {"participation.available": 0.5}, "available is of rounds"),
        ("federated", {}, ON | {"participation.first": 1, "privacy.enabled": True}, "displace"),
        ("federated", {}, ON | SKELLAM, "noise in shares is missing"),
        ("central", {}, ON, "unset participation.enabled"),
        ("federated", {}, {"data.skew_alpha": 1.0}, "needs data.skew"),
        ("federated", {}, {"data.skew": "words", "data.quantity_skew": 1.0}, "set it, large"),
        ("federated", {}, {**APART, "data.iid": True}, "both deal utterances out"),
    ],
)
def test_what_does_not_go_together_is_one_line(algorithm, options, changes, message, corpus_dir):
    config = configured(corpus_dir, algorithm, options, changes)
    with pytest.raises(UserError, match=message) as caught:
        config = whole.checked(config)
        selection.check(config, None)
    assert "\n" not in str(caught.value)


def test_training_users_differ_as_is_asked(corpus_dir):
    def users(changes):
        config = configured(corpus_dir, "federated", {}, changes)
        return corpora.Data(corpus_dir, whole.checked(config), lambda text: None)

    natural, apart = users({"data.skew": "voices"}), users({**APART, "data.quantity_skew": 1.0})
    assert users({}).skew is None
    assert natural.skew["distance"] == pytest.approx(5 / 6) and natural.skew["gini"] == 0
    assert apart.skew["distance"] < 5 / 6 and apart.skew["gini"] > 0
    assert apart.train.sizes.sum() == natural.train.sizes.sum() == 12
    assert users({**APART, "data.quantity_skew": 1.0}).skew == apart.skew
    assert (apart.spoken.sizes == natural.train.sizes).all()  # whoever trains on it now


@pytest.mark.parametrize("algorithm", ["scaffold", "ditto"])
def test_what_is_remembered_is_of_what_is_trained(algorithm, corpus_dir):
    """With low-rank adaptation, control variates and users' own models are as small as that."""
    changes = {"peft.kind": "lora"}
    plain, small = (
        whole.checked(configured(corpus_dir, algorithm, {}, more)) for more in ({}, changes)
    )
    sizes = [models.local_layout(config).size for config in (plain, small)]
    assert 0 < sizes[1] < sizes[0] / 2
    sent = [{"method": "", "down_bytes": 0, "up_bytes": 0}]
    found = algorithms.with_extras(small, sent)[-1]["up_bytes"]
    assert found == (4 * sizes[1] if algorithm == "scaffold" else 0)
