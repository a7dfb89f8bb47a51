"""Work directories in cloud storage, emulated in memory: cuts at any write, resume, refusals.

The model is a few numbers, so that a run takes a second; all else is a run's own.
"""

import json
import re
import shutil
import sys
import threading
import uuid

import fsspec
import jax
import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.training import dry_run, locks, loop
from fedasr.training.checkpoint import read_metadata, restore_params
from fedasr.training.config import default_config
from fedasr.training.logging import read_metrics, to_json
from fedasr.training.remote import copies, mirror, owner, storage
from fedasr.training.remote.copies import STEP_MARKER, local
from fedasr.training.remote.storage import Storage
from fedasr.training.session import Session
from fedasr.training.stored import verify

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.usefixtures("small_model", "quick")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """No waiting, for a network or for others; copies in a folder of this test."""
    monkeypatch.setenv("FEDASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(owner, "_SETTLED", 0.0)
    monkeypatch.setattr(storage, "_WAITS", ())
    monkeypatch.setattr(storage, "_AT_ONCE", 1)
    copies.refresh()


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two users of a seed, four who train, one to choose by."""
    sound = 0.1 * np.random.default_rng(0).standard_normal(8_000, np.float32), 16_000
    said = [
        Utterance(f"{split}-{user}", f"{split}-{user}", "one two", split, lambda: sound)
        for split, users in {"seed": 2, "train": 4, "dev": 1}.items()
        for user in range(users)
    ]
    folder = tmp_path_factory.mktemp("remote") / "data"
    prepare(said, folder, name="noise")
    return folder


def configure(corpus, **changes):
    config = default_config()
    config.data.update(dir=str(corpus), eval=())
    config.update(rounds=3, cohort=2, devices=1, chunk=2)
    config.client.update(steps=1, batch_size=1)
    config.seed_training.update(steps=2, batch_size=2)
    config.checkpoint.update(every=1, seed_every=0)
    config.evaluation.update(every=0, while_training=())
    config.server.optimizer = "sgd"
    config.privacy.update(sampler="fixed", deployments=())
    config.update_from_flattened_dict(changes)
    return to_json(config.to_dict())


@pytest.fixture(scope="module")
def whole(corpus, small_model, tmp_path_factory):
    """(work directory, summary) of a run on a disk."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, loop.run(configure(corpus), folder)


def same_params(one, other):
    jax.tree.map(np.testing.assert_array_equal, restore_params(one), restore_params(other))


def names(url):
    return sorted(Storage(url).sizes())


class Gone(BaseException):
    """The machine is: nothing is written any more, and nobody is told."""


class Machine:
    """Ends after a number of changes of what is stored, signs of life aside.

    Args:
      patch: a monkeypatch.
      changes: how many it lives to see.
      since: patterns: changes count after a file of each, in their order, has been changed.
    """

    def __init__(self, patch, changes, *since):
        self.left, self.since, self.lock = changes, [*since], threading.Lock()
        self.seen = []  # names
        for name in ("_put", "_put_file"):
            patch.setattr(Storage, name, self.until_gone(getattr(Storage, name)))
        remove = Storage.remove
        removed = self.until_gone(lambda storage, name: remove(storage, [name]))
        patch.setattr(Storage, "remove", lambda s, names: [removed(s, name) for name in names])
        patch.setattr(threading, "excepthook", lambda problem: None)

    def until_gone(self, change):
        def changed(*args):
            name = next(arg for arg in args[1:] if isinstance(arg, str))
            with self.lock:
                if self.since:
                    del self.since[: bool(re.match(self.since[0], name))]
                elif name != locks.OWNER_FILE:
                    self.left -= 1
                if self.left < 0:
                    raise Gone
                self.seen.append(name)
            return change(*args)

        return changed


def test_a_run_in_a_bucket_is_one_on_a_disk(corpus, whole, url, tmp_path, capsys):
    summary = loop.run(configure(corpus), url)
    for name in summary.keys() - {"wall_seconds", "client_steps_per_second"}:
        assert summary[name] == whole[1][name], name
    same_params(url, whole[0])
    there = names(url)
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert steps == {"4", "5"} and {"config.json", "metrics.jsonl", "summary.json"} <= {*there}
    assert locks.OWNER_FILE not in there and locks.LOCK_FILE not in there
    assert not mirror.place_of(url).parent.exists()
    # It is done: nothing is trained, and nothing changes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.stages, "run_stages", None)
        assert loop.run(configure(corpus), url + "/") == summary
    assert names(url) == there
    with pytest.raises(UserError, match=rf"--workdir={url} .*differs in seed"):
        loop.run(configure(corpus, seed=1), url)
    with pytest.raises(UserError, match=r"differs in seed"):
        dry_run.dry_run(configure(corpus, seed=1), url)
    copies.refresh()
    assert dry_run.dry_run(configure(corpus), url)["rounds"] == 3
    assert names(url) == there
    assert read_metadata(url)["units"] == 3
    # Longer, and moved: what is in the bucket is a work directory.
    longer = loop.run(configure(corpus), url, extend=4)
    assert [len(longer["history"]), longer["rounds"]] == [1, 4]
    copies.refresh()
    shutil.copytree(local(url), tmp_path / "moved")
    assert loop.run(configure(corpus, rounds=4), tmp_path / "moved") == longer


@pytest.mark.parametrize("changes", [0, 1, 13, 19, 23, 26, 33, 45, 59])
def test_wherever_the_machine_is_gone_another_goes_on(corpus, whole, url, changes, capfd):
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, changes)
        patch.setattr(mirror, "say", lambda text: None)
        with pytest.raises(Gone):
            loop.run(configure(corpus), url)
    assert locks.OWNER_FILE in names(url)
    shutil.rmtree(mirror.copies_folder(), ignore_errors=True)  # of another machine
    Storage(url).remove([locks.OWNER_FILE])  # which watched it for a while
    summary = loop.run(configure(corpus), url)
    assert "damaged" not in capfd.readouterr().err
    same_params(url, whole[0])
    assert summary["wer"] == whole[1]["wer"] and summary["status"] == "completed"
    there = names(url)
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {"4", "5"}
    assert copies.leftovers(there) == [] and locks.OWNER_FILE not in there
    copies.refresh()
    for step in ("4", "5"):
        verify(local(url) / "checkpoints" / step)
    rounds = [[r.get("round") for r in read_metrics(folder)] for folder in (local(url), whole[0])]
    assert rounds[0] == rounds[1]


def test_users_rows_go_on_elsewhere(corpus, url, tmp_path):
    changes = {"algorithm": "scaffold", "privacy.enabled": False}
    changes |= {"privacy.sampler": "fixed"}
    config = configure(corpus, **changes)
    loop.run(config, tmp_path / "disk")
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, 0, f"checkpoints/.*{STEP_MARKER}", "local/rows")
        patch.setattr(mirror, "say", lambda text: None)
        with pytest.raises(Gone):
            loop.run(config, url)
    shutil.rmtree(mirror.copies_folder())
    Storage(url).remove([locks.OWNER_FILE])
    # Rows that are newer than the last checkpoint that counts there.
    assert machine.seen.count("local/rows.f32") == 2
    assert sum(name.endswith(STEP_MARKER) for name in names(url)) == 1
    loop.run(config, url)
    same_params(url, tmp_path / "disk")
    with pytest.raises(UserError, match=r"checkpoint\.keep=1: users' rows"):
        loop.run(configure(corpus, **changes, **{"checkpoint.keep": 1}), f"{url}-other")
    assert names(f"{url}-other") == []


@pytest.mark.slow
def test_the_best_state_goes_on_elsewhere(corpus, url, tmp_path, monkeypatch):
    def evaluate(self, params, splits=None):  # the small model has no transcripts
        size = float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(params))))
        return {"dev": {"wer": size, "cer": size, "loss": size}}

    monkeypatch.setattr(Session, "evaluate", evaluate)
    changes = {"data.eval": ("dev",), "evaluation.while_training": ("dev",), "evaluation.every": 1}
    config = configure(corpus, **changes, **{"selection.split": "dev"})
    expected = loop.run(config, tmp_path / "disk")
    for whole_there, (changes, since) in enumerate([(3, "best/"), (0, f"best/.*{STEP_MARKER}")]):
        with pytest.MonkeyPatch.context() as patch:
            Machine(patch, changes, since)
            patch.setattr(mirror, "say", lambda text: None)
            with pytest.raises(Gone):
                loop.run(config, url)
        shutil.rmtree(mirror.copies_folder())
        Storage(url).remove([locks.OWNER_FILE])
        there = [name for name in names(url) if name.startswith("best/")]
        assert there and whole_there == sum(name.endswith(STEP_MARKER) for name in there)
    summary = loop.run(config, url)
    assert summary["selection"] == expected["selection"] and summary["wer"] == expected["wer"]
    same_params(url, tmp_path / "disk")
    assert len({name.split("/")[1] for name in names(url) if name.startswith("best/")}) == 1


def test_a_bucket_that_fails_ends_the_run_in_one_line(corpus, whole, url, monkeypatch):
    put = Storage._put_file

    def full(self, path, name):
        if name.startswith("checkpoints/4/"):
            raise OSError("503 try later")
        put(self, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "_put_file", full)
        said = []
        patch.setattr(mirror, "say", said.append)
        with pytest.raises(UserError, match=r"cannot be written \(checkpoints/4/.*503 try later"):
            loop.run(configure(corpus), url)
        assert len(said) == 1 and str(mirror.place_of(url)) in said[0]
    loop.run(configure(corpus), url)
    same_params(url, whole[0])


def test_what_is_stored_otherwise_than_written_does_not_count(corpus, url, monkeypatch):
    put = Storage._put_file

    def garbled(self, path, name):
        put(self, path, name)
        if name.endswith(STEP_MARKER):
            self._put(name, b"something else")

    monkeypatch.setattr(Storage, "_put_file", garbled)
    monkeypatch.setattr(mirror, "say", lambda text: None)
    with pytest.raises(UserError, match=r"is not what was written there"):
        loop.run(configure(corpus), url)


def test_one_process_at_a_time(corpus, url, monkeypatch):
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    with owner.Owner(Storage(url)) as first:
        with pytest.raises(UserError, match="in use by another process"):
            loop.run(configure(corpus), url)
        # One elsewhere that is heard of, and one that is not.
        monkeypatch.setattr(locks, "_boot", lambda: "elsewhere")
        with pytest.raises(UserError, match="in use by another process"):
            loop.run(configure(corpus), url)
        first._stop.set()
        with owner.Owner(Storage(url)):
            with pytest.raises(UserError, match="was taken over by another process"):
                first.check()
        Storage(url).write(locks.OWNER_FILE, json.dumps(first._me).encode())
        assert loop.run(configure(corpus), url)["status"] == "completed"
    assert locks.OWNER_FILE not in names(url)


def test_a_copy_that_loses_its_checkpoints_takes_none_away(corpus, url, monkeypatch):
    loop.run(configure(corpus), url)
    there = names(url)
    with pytest.raises(UserError, match="has lost checkpoints"):
        with mirror.mirrored(url) as copy:
            shutil.rmtree(copy.folder / "checkpoints")
    with pytest.raises(UserError, match="was moved or removed"):
        with mirror.mirrored(url) as copy:
            shutil.rmtree(copy.folder)
    assert names(url) == there


def test_a_run_starts_from_one_in_a_bucket(corpus, url, tmp_path):
    loop.run(configure(corpus), url)
    changes = {"seed_training.steps": 0, "rounds": 1}
    one = loop.run(configure(corpus, init_from=url, **changes), tmp_path / "one")
    here = configure(corpus, init_from=str(local(url)), **changes)
    two = loop.run(here, tmp_path / "two")
    same_params(tmp_path / "one", tmp_path / "two")
    assert one["privacy"]["ledger"] == two["privacy"]["ledger"]
    with pytest.raises(UserError, match="no checkpoint in memory://"):
        loop.run(configure(corpus, init_from=f"{url}/nothing", **changes), tmp_path / "three")


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("gs:/bucket/run", "is not on a file system"),
        ("nothing-like-it://bucket/run", "no file system is known by that name"),
        ("gs://bucket/run", r"pip install 'fedasr\[remote\]'"),
    ],
)
def test_what_is_no_storage_is_refused(corpus, place, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=why):
        loop.run(configure(corpus), place)
    with pytest.raises(UserError, match=why):
        dry_run.dry_run(configure(corpus), place)
    assert list(tmp_path.glob("*:*")) == []


def test_names_that_lead_out_of_the_folder_are_refused(url, tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"{Storage(url)._root}/a/../../b", b"x")
    with pytest.raises(UserError, match="which no folder can"):
        Storage(url).sizes()


def test_a_seed_for_others_needs_a_folder(corpus, url):
    with pytest.raises(UserError, match="must then be a local folder"):
        loop.run(configure(corpus), url, only_seed=True)
    with pytest.raises(UserError, match="must then be a local folder"):
        dry_run.dry_run(configure(corpus, **{"seed_training.reuse": True}), url)
