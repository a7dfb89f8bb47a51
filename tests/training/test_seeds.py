"""A seed is trained once: later runs with the same settings and data take it, bit for bit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.training import loop, seeds, stages
from fedasr.training.checkpoint import read_metadata, restore_params
from fedasr.training.config import Config, default_config
from fedasr.training.logging import read_metrics, to_json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    def noise(number):
        return 0.1 * np.random.default_rng(number).standard_normal(8_000, np.float32), 16_000

    utterances = [
        Utterance(f"{split}{user}-{i}", f"{split}{user}", "one two", split, lambda i=i: noise(i))
        for split, users in {"seed": 1, "train": 2}.items()
        for user in range(users)
        for i in range(2)
    ]
    directory = tmp_path_factory.mktemp("seeds") / "data"
    prepare(utterances, directory, name="noise")
    return directory


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)


def configure(corpus, **changes):
    config = default_config()
    config.data.update(dir=str(corpus), eval=())
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    config.update(rounds=1, cohort=2, chunk=1, devices=1)
    config.client.update(steps=1, batch_size=2)
    config.seed_training.update(steps=2, batch_size=2, reuse=True)
    config.evaluation.while_training = ()
    config.update_from_flattened_dict(changes)
    return to_json(config.to_dict())


def seed_steps(workdir):
    return [r["step"] for r in read_metrics(workdir) if r["phase"] == "seed"]


def test_a_later_run_takes_the_seed_and_ends_as_one_that_trained_it(corpus, tmp_path):
    config = configure(corpus)
    first = loop.run(config, tmp_path / "a" / "first")
    later = loop.run(configure(corpus, name="later", rounds=2), tmp_path / "a" / "later")
    same = loop.run(config, tmp_path / "a" / "same")
    anew = configure(corpus, **{"seed_training.reuse": False})
    alone = loop.run(anew, tmp_path / "a" / "alone")
    assert seed_steps(tmp_path / "a" / "first") == [2]
    assert seed_steps(tmp_path / "a" / "later") == seed_steps(tmp_path / "a" / "same") == []
    assert seed_steps(tmp_path / "a" / "alone") == [2]
    assert {run["status"] for run in (first, later, same, alone)} == {"completed"}
    expected = restore_params(tmp_path / "a" / "first")
    for other in ("same", "alone"):
        found = restore_params(tmp_path / "a" / other)
        jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert first["run"] == alone["run"]  # and so all that is random
    entries = [read_metadata(tmp_path / "a" / x)["ledger"]["own"] for x in ("same", "alone")]
    assert entries[0] == entries[1] and entries[0][0]["stage"] == "seed"


def test_the_seed_alone(corpus, tmp_path):
    found = loop.run(configure(corpus), tmp_path / "seed", only_seed=True)
    assert found["status"] == "seed" and found["steps"] == 2
    assert loop.run(configure(corpus), tmp_path / "again", only_seed=True)["seed"] == found["seed"]
    assert seed_steps(tmp_path / "again") == []
    started = configure(corpus, init_from=found["seed"])
    summary = loop.run(started, tmp_path / "run")
    # What the seed saw is known to whoever starts from it.
    earlier = summary["privacy"]["ledger"]["earlier"]
    assert [(e["stage"], e["users"]) for e in earlier] == [("seed", 1)]
    # The folder goes on with the whole run.
    assert loop.run(configure(corpus), tmp_path / "seed")["status"] == "completed"
    with pytest.raises(UserError, match="beyond its seed"):
        loop.run(configure(corpus), tmp_path / "seed", only_seed=True)
    for changes in ({"seed_training.steps": 0}, {"init_from": found["seed"]}):
        with pytest.raises(UserError, match="trains no seed"):
            loop.run(configure(corpus, **changes), tmp_path / "no", only_seed=True)
    with pytest.raises(UserError, match="no split 'dev'"):
        changes = {"seed_training.split": "dev"}
        loop.run(configure(corpus, **changes), tmp_path / "no", only_seed=True)


def test_a_damaged_seed_is_trained_again_and_replaced(corpus, tmp_path):
    found = loop.run(configure(corpus), tmp_path / "first", only_seed=True)
    expected = restore_params(found["seed"])
    (arrays,) = [p for p in seeds.Path(found["seed"]).rglob("d") if p.is_dir()][:1]
    shutil.rmtree(arrays)
    loop.run(configure(corpus), tmp_path / "second", only_seed=True)
    assert seed_steps(tmp_path / "second") == [2]
    jax.tree.map(np.testing.assert_array_equal, expected, restore_params(found["seed"]))


def test_a_seed_that_cannot_be_kept_is_a_warning_unless_it_is_all_that_is_wanted(
    corpus, tmp_path, capsys
):
    (tmp_path / ".seeds").write_text("in the way")
    summary = loop.run(configure(corpus), tmp_path / "run")
    assert summary["status"] == "completed"
    assert "it is not kept" in summary["side_channel_failures"]["seed"]
    assert capsys.readouterr().err.count("warning: seed: it is not kept") == 1
    with pytest.raises(UserError, match=r"seed_only: no seed in .*: it is not kept"):
        loop.run(configure(corpus), tmp_path / "alone", only_seed=True)


def test_the_identity_is_of_all_that_makes_a_seed(monkeypatch):
    config = Config().with_data(identity="data", characters="ab")
    devices = jax.devices()[:1]

    def named(*path, value, of=config):
        if len(path) == 1:
            return dataclasses.replace(of, **{path[0]: value})
        section = dataclasses.replace(getattr(of, path[0]), **{path[1]: value})
        return dataclasses.replace(of, **{path[0]: section})

    own = seeds.identity(config, devices)
    for path, value in {
        ("rounds",): 9,
        ("name",): "other",
        ("cohort",): 3,
        ("seed_training", "reuse"): True,
        ("augment", "start_round"): 5,
        ("data", "dir"): "elsewhere",
        ("privacy", "sigma"): 0.5,
    }.items():
        assert seeds.identity(named(*path, value=value), devices) == own, path
    for path, value in {
        ("seed",): 1,
        ("seed_training", "steps"): 7,
        ("seed_training", "learning_rate"): 0.5,
        ("augment", "enabled"): True,
        ("model", "name"): "conformer",
        ("data", "identity"): "other",
        ("data", "characters"): "abc",
    }.items():
        assert seeds.identity(named(*path, value=value), devices) != own, path
    assert seeds.identity(config, jax.devices()) != own or len(jax.devices()) == 1
    monkeypatch.setattr(seeds.exactness, "source", lambda: "changed")
    assert seeds.identity(config, devices) != own
