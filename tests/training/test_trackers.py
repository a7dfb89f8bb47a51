"""Trackers of others: offline, one record a round also after a resume, and never in a run's way."""

import io
import json
import os
import sqlite3

import pytest

from fedasr.errors import UserError
from fedasr.training import trackers
from fedasr.training.logging import RunLogger

CONFIG = {"name": "x", "client": {"learning_rate": 0.3, "name": None}}


class Fake:
    """Remembers for all who open it."""

    told: list
    opened: list

    def __init__(self, place):
        self.id = place.id or "new"
        self.opened.append((place.name, place.id, place.config))

    def write(self, phase, number, values):
        self.told.append((phase, number, values))

    def close(self):
        self.told.append("closed")


@pytest.fixture
def fake(monkeypatch):
    Fake.told, Fake.opened = [], []
    monkeypatch.setitem(trackers.TRACKERS, "fake", Fake)
    return Fake


def logger(workdir, *arguments, names=("fake",)):
    return RunLogger(
        workdir, *arguments, tensorboard=False, stream=io.StringIO(), trackers=names, config=CONFIG
    )


def tell(workdir, rounds, *arguments, names=("fake",)):
    with logger(workdir, *arguments, names=names) as log:
        if not arguments:
            log.step(2, {"loss": 9.0})
        for number in rounds:
            log.round(number, {"loss": float(number), "eval": {"dev": {"wer": 50.0}}, "note": "x"})
    return log


def test_each_round_once_also_after_a_resume(fake, tmp_path):
    tell(tmp_path / "run", range(5))
    tell(tmp_path / "run", range(3, 7), 2, None)  # of the checkpoint 2: 3 and 4 are repeated
    told = [one for one in fake.told if one != "closed"]
    assert [one[:2] for one in told] == [("seed", 2), *(("federated", i) for i in range(7))]
    assert told[1][2] == {"loss": 0.0, "eval/dev/wer": 50.0}
    assert fake.told.count("closed") == 2
    assert fake.opened == [("run", "", CONFIG), ("run", "new", CONFIG)]


def test_one_that_fails_is_named_once_and_harms_nothing(fake, tmp_path, monkeypatch):
    def broken(self, *_):
        raise ConnectionError("no network")

    monkeypatch.setattr(Fake, "write", broken)
    log = tell(tmp_path, range(3))
    assert log.failures == {"fake": "ConnectionError: no network"}
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 4


def test_mistakes_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="there are wandb, mlflow, trackio"):
        trackers.check_trackers(["comet"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mlflow"):
        trackers.check_trackers(["mlflow"])


@pytest.mark.slow
def test_mlflow_has_every_round_once(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is an extra")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for arguments in ((range(5),), (range(3, 7), 2, None)):
        assert not tell(tmp_path / "run", *arguments, names=["mlflow"]).failures
    with sqlite3.connect(tmp_path / "run" / "trackers" / "mlflow.db") as database:
        rows = database.execute(
            "select key, step, value from metrics order by key, step"
        ).fetchall()
        names = database.execute("select name, status from runs").fetchall()
    loss = [(step, value) for key, step, value in rows if key == "federated/loss"]
    assert loss == [(i, float(i)) for i in range(7)]
    assert ("seed/loss", 2, 9.0) in rows and names == [("run", "FINISHED")]


@pytest.mark.slow
def test_wandb_has_every_round_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for arguments in ((range(5),), (range(3, 7), 2, None)):
        assert not tell(tmp_path / "run", *arguments, names=["wandb"]).failures
    found = []
    for path in sorted((tmp_path / "run" / "trackers").rglob("run-*.wandb")):
        found += [row for row in history(path) if "federated/round" in row]
    assert [(row["federated/round"], row["federated/loss"]) for row in found] == [
        (i, float(i)) for i in range(7)
    ]


def history(path):
    """Rows of a file of an offline run: a header of 7 bytes, then a log in LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is empty
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):  # whole, or the last part
            continue
        record = wandb_internal_pb2.Record.FromString(whole)
        whole = b""
        if record.WhichOneof("record_type") == "history":
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


@pytest.mark.slow
def test_trackio_has_every_round_once(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is an extra")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TRACKIO_PROJECT", f"test{abs(hash(tmp_path)) % 10**9}")
    for arguments in ((range(5),), (range(3, 7), 2, None)):
        assert not tell(tmp_path / "run", *arguments, names=["trackio"]).failures
    known = json.loads((tmp_path / "run" / "trackers" / "trackio.json").read_text())
    rows = SQLiteStorage.get_logs(os.environ["TRACKIO_PROJECT"], known["id"])
    rounds = [row["federated/round"] for row in rows if "federated/round" in row]
    assert rounds == list(range(7))
