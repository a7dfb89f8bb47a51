"""Every file of a work directory is cut, garbled, emptied, lost and swapped with another run's.

The same command then comes to the same parameters, users' rows and summary, or says in one line
what is wrong and what to do. The model is a few numbers, so that a run takes a second.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.federated.local import LocalStore
from fedasr.training import loop
from fedasr.training.builders import models
from fedasr.training.checkpoint import restore_params
from fedasr.training.config import Config, default_config
from fedasr.training.logging import to_json

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.usefixtures("small_model")

USERS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    sound = 0.1 * np.random.default_rng(0).standard_normal(8_000, np.float32), 16_000
    said = [Utterance(str(u), str(u), "one two", "train", lambda: sound) for u in range(USERS)]
    folder = tmp_path_factory.mktemp("damaged") / "data"
    prepare(said, folder, name="noise")
    return folder


def configure(corpus, **changes):
    config = default_config()
    config.data.update(dir=str(corpus), eval=())
    config.update(rounds=4, cohort=2, devices=1)
    config.client.update(steps=1, batch_size=1)
    config.checkpoint.every = 1
    config.evaluation.update(every=0, while_training=())
    config.server.optimizer = "sgd"
    config.local.patterns = ("bias",)
    config.privacy.update(sampler="fixed", deployments=())
    config.update_from_flattened_dict(changes)
    return to_json(config.to_dict())


def digest(config, folder, rounds=4):
    layout = models.local_layout(Config.of(config))
    with LocalStore(folder / "local", layout, USERS, read_only=True) as store:
        store.restore(rounds)
        return store.digest()


@pytest.fixture(scope="module")
def whole(corpus, small_model, tmp_path_factory):
    """(configuration, folder, summary, a copy killed after round 3, another run's likewise)."""
    root = tmp_path_factory.mktemp("runs")
    config = configure(corpus)
    summary = loop.run(config, root / "whole")
    loop.run(configure(corpus, seed=1), root / "other")
    for name in ("whole", "other"):
        shutil.copytree(root / name, root / f"{name} half")
        shutil.rmtree(root / f"{name} half" / "checkpoints" / "4")
        (root / f"{name} half" / "summary.json").unlink()
    return config, root / "whole", summary, root / "whole half", root / "other half"


def hurt(path, how, theirs):
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "lost":
        path.unlink()
    elif how == "swapped":
        path.write_bytes(theirs.read_bytes() if theirs.exists() else b"\0" * len(data))
    else:
        for place in range(len(data) // 3, len(data), max(1, len(data) // 7)):
            data[place] ^= 0x15
        path.write_bytes(data)


def judge(whole, folder):
    """ "same", or what the refusal says is to be removed; fails for anything else."""
    config, reference, summary, _, _ = whole
    try:
        found = loop.run(config, folder)
    except UserError as error:
        line = str(error)
        assert "\n" not in line and str(folder) in line, line
        assert "remove" in line or "put" in line, line
        return line
    jax.tree.map(np.testing.assert_array_equal, restore_params(folder), restore_params(reference))
    assert digest(config, folder) == digest(config, reference)
    for name in summary.keys() - {"wall_seconds", "client_steps_per_second"}:
        assert found[name] == summary[name], name
    return "same"


def obey(folder, line):
    """Removes what a refusal says is to be removed."""
    path = folder / "checkpoints"
    if "folder of checkpoints" not in line:
        path = Path(re.findall(re.escape(str(folder)) + r"/[^\s:;,()]+", line)[0])
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "garbled", "emptied", "lost", "swapped"])
@pytest.mark.parametrize("where", ["local", "checkpoints/3", "."])
def test_a_file_that_is_not_what_it_was(whole, tmp_path, how, where):
    half, other = whole[3], whole[4]
    files = [p for p in (half / where).rglob("*") if p.is_file() and not p.is_symlink()]
    if where == ".":
        files = [p for p in files if p.parent == half]
    elif where == "checkpoints/3":  # each kind of file once: data of arrays are many
        files = list({(p.parent.name, p.suffix): p for p in files}.values())
    assert files
    for number, path in enumerate(sorted(files)):
        name, folder = path.relative_to(half), tmp_path / str(number)
        shutil.copytree(half, folder)
        hurt(folder / name, how, other / name)
        if (line := judge(whole, folder)) != "same":
            obey(folder, line)
            assert judge(whole, folder) == "same", (name, line)


@pytest.mark.parametrize("name", ["rows.f32", "slots.i64"])
@pytest.mark.parametrize("how", ["cut", "garbled", "emptied", "swapped", "bit"])
def test_damaged_rows_are_never_used(whole, tmp_path, monkeypatch, name, how):
    config, _, _, half, other = whole
    shutil.copytree(half, tmp_path / "run")
    path = tmp_path / "run" / "local" / name
    if how == "bit":
        data = bytearray(path.read_bytes())
        layout = models.local_layout(Config.of(config))
        with LocalStore(path.parent, layout, USERS, read_only=True) as store:
            store.restore(3)
            slot = int(store._slot[store._slot >= 0][0])
        data[4 * layout.size * slot if name == "rows.f32" else 16 * (slot + 1) + 8] ^= 1
        path.write_bytes(data)
    else:
        hurt(path, how, other / "local" / name)

    def trained(*args):
        raise AssertionError("it was used")

    monkeypatch.setattr("fedasr.training.trainers.federated.FederatedTrainer.train", trained)
    with pytest.raises(UserError, match=r"put the files there back from a copy; or, .* remove"):
        loop.run(config, tmp_path / "run")


def test_a_summary_that_is_damaged_or_of_another_run_is_made_again(whole, tmp_path, capsys):
    config, reference, summary, _, _ = whole
    shutil.copytree(reference, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    written = json.loads(path.read_text())
    for change, words in (
        ({"parameters": 11}, "is damaged: it is made again"),
        ({"run": "0" * 16, "check": None}, "is of another run than the checkpoints"),
    ):
        changed = {k: v for k, v in (written | change).items() if v is not None or k != "check"}
        path.write_text(json.dumps(changed))
        found = loop.run(config, tmp_path / "run")
        assert words in capsys.readouterr().err
        assert found["parameters"] == summary["parameters"] and found["run"] == summary["run"]
    assert loop.run(config, tmp_path / "run") == found
    assert "made again" not in capsys.readouterr().err
