"""Errors by user of a run: what prepared data says of utterances, and minutes of training."""

import base64
import io
import json
import wave
from types import SimpleNamespace

import numpy as np
import pytest

from fedasr.data.listing import read_listing
from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus
from fedasr.data.utterances import Utterance
from fedasr.evaluation.hypotheses import Hypothesis, read_hypotheses
from fedasr.training import heard, served, stages
from fedasr.training.evaluation import Decoded

pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")


def sound(seconds):
    return lambda: (
        0.1 * np.random.default_rng(0).standard_normal(int(16_000 * seconds), np.float32),
        16_000,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Three users: a and b in training, b and c in the test; a line of theirs each."""
    rows = [
        ("a0", "a", "one", "train", 2.0, {"gender": "f"}),
        ("b1", "b", "two", "train", 1.0, {"gender": "m"}),
        ("b0", "b", "one two", "test", 1.0, {"gender": "m", "mood": "good"}),
        ("b2", "b", "two", "test", 1.5, {"gender": "m", "mood": "bad"}),
        ("c\u2028", "c", "one", "test", 1.0, {}),
    ]
    utterances = [
        Utterance(name, user, text, split, sound(seconds), said)
        for name, user, text, split, seconds, said in rows
    ]
    out = tmp_path_factory.mktemp("served")
    prepare(utterances, out / "audio", name="three", store="audio")
    prepare(utterances, out / "data", name="three")
    return out / "data"


def decoded():
    """In the order of some batches: c, then b's second, then b's first."""
    return [
        Decoded(1, 0, "one", "", 98),
        Decoded(0, 1, "two", "two", 148),
        Decoded(0, 0, "one two", "one too", 98),
    ]


def test_hypotheses_have_the_metadata_of_their_utterance(directory):
    corpus = open_corpus(directory, "test")
    found = served.hypotheses_of(directory, "test", corpus, decoded())
    assert [(x.user, x.id, dict(x.metadata)) for x in found] == [
        ("b", "b0", {"gender": "m", "mood": "good"}),
        ("b", "b2", {"gender": "m", "mood": "bad"}),
        ("c", "c\u2028", {}),
    ]
    assert found[1].seconds == pytest.approx(1.5, abs=0.01)
    # Of an expression no more is known than what all of a user's utterances say.
    found = served.hypotheses_of(directory, "test[:100%]", corpus, decoded())
    assert [(x.id, dict(x.metadata)) for x in found][:2] == [("", {"gender": "m"})] * 2
    assert read_listing(directory, "train")[0]["a"][0].metadata == {"gender": "f"}


def test_minutes_of_training_are_those_of_the_recordings(directory):
    train = open_corpus(directory, "train")
    found = served.training_minutes(directory, [train])
    assert found == pytest.approx({"a": 2 / 60, "b": 1 / 60}, rel=0.03)
    twice = served.training_minutes(directory, [train, train])
    assert twice == pytest.approx({name: 2 * value for name, value in found.items()})


def test_users_without_speech_have_no_minutes(directory):
    """Nor do they take those of the next."""
    corpus = open_corpus(directory, "train")

    more = SimpleNamespace(
        users=["-", *corpus.users, "z"],
        sizes=np.array([0, *corpus.sizes, 0]),
        all_lengths=corpus.all_lengths,
    )
    found = served.training_minutes(directory, [more])
    assert found == served.training_minutes(directory, [corpus]) | {"-": 0, "z": 0}


def test_a_run_writes_who_is_served(directory, tmp_path):
    corpora = {"test": open_corpus(directory, "test")}
    trained = [open_corpus(directory, "train")]
    short = served.write_served(tmp_path, directory, corpora, {"test": decoded()}, trained)
    assert short["test"]["users"] == 2
    assert short["test"]["mean"] == pytest.approx((100 / 3 + 100) / 2)
    users = json.loads((tmp_path / "users.json").read_text())["test"]
    rates = {row["user"]: row["wer"] for row in users["by_user"]}
    assert rates == pytest.approx({"b": 100 / 3, "c": 100})
    assert users["columns"]["seen in training"]["groups"]["unseen"]["rate"] == 100
    assert users["confusions"]["words"][0]["count"] == 1
    assert [x.hypothesis for x in read_hypotheses(tmp_path)] == ["one too", "two", ""]


def test_the_worst_are_kept_with_their_sound(directory, tmp_path, monkeypatch):
    stored = directory.parent / "audio"
    corpus = open_corpus(stored, "test")
    served.write_served(tmp_path, stored, {"test": corpus}, {"test": decoded()}, [])
    found = json.loads((tmp_path / "worst.json").read_text())["test"]
    rows = found["utterances"]
    # Of two with one error the shorter; the utterance without any is not there.
    assert [(x["id"], x["errors"], x["words"]) for x in rows] == [("c\u2028", 1, 1), ("b0", 1, 2)]
    assert not found["why"]
    for row, seconds in zip(rows, (1.0, 1.0), strict=True):
        assert row["seconds"] == seconds
        with wave.open(io.BytesIO(base64.b64decode(row["wav"]))) as file:
            assert (file.getframerate(), file.getnchannels()) == (16_000, 1)
            samples = np.frombuffer(file.readframes(10**6), "<i2")
        expected = np.random.default_rng(0).standard_normal(int(16_000 * seconds), np.float32)
        assert abs(samples - 3276.8 * expected).max() <= 1
    # Bounded: what does not fit has no sound, and that is said.
    monkeypatch.setattr(heard, "_MOST_SAMPLES", 20_000)
    found = served.hypotheses_of(stored, "test", corpus, decoded())
    short = heard.describe_worst(stored, "test", found)
    assert [bool(x["wav"]) for x in short["utterances"]] == [True, False]
    assert "too large" in short["why"]
    # Features cannot be heard.
    silent = heard.describe_worst(directory, "test", found)
    assert "--store=audio" in silent["why"] and not any(x["wav"] for x in silent["utterances"])
    assert heard.describe_worst(directory, "test", found[1:2])["utterances"] == []
    many = [Hypothesis("test", "b", i, "one " * (i + 1), "") for i in range(12)]
    assert [errors for _, errors in heard.worst_of(many)] == list(range(12, 2, -1))


def test_minutes_are_of_who_spoke_and_a_failure_is_told(monkeypatch, tmp_path):
    """Not of who trains on it: utterances may be dealt out to other users."""
    told = []
    data = SimpleNamespace(directory=tmp_path, evaluation={}, train=1, spoken=2, seed=None)
    session = SimpleNamespace(
        parts=SimpleNamespace(data=data),
        logger=SimpleNamespace(failures={}),
        logs=tmp_path,
        decoded={},
        message=told.append,
    )
    monkeypatch.setattr(served, "write_served", lambda *args: {"trained": args[-1]})
    assert stages._served(session) == {"trained": [2]} and not told
    monkeypatch.setattr(served, "write_served", lambda *args: 1 / 0)
    assert stages._served(session) == {}
    assert "ZeroDivisionError" in told[0] and "not told" in told[0]
    assert list(session.logger.failures) == ["errors by user"]


def test_a_list_that_is_not_there(directory, tmp_path):
    (tmp_path / "corpus.json").write_bytes((directory / "corpus.json").read_bytes())
    assert read_listing(tmp_path, "test") == ({}, False)
    (tmp_path / "utterances.jsonl").write_text('{"split": "test", "user"')
    assert read_listing(tmp_path, "test") == ({}, False)
    corpus = open_corpus(directory, "test")
    found = served.hypotheses_of(tmp_path, "test", corpus, decoded())
    assert [x.user for x in found] == ["b", "b", "c"]
