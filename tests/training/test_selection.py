"""The state that is best on a split is kept, whatever stopped the run, and paid for in full."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.federated.server import ServerState
from fedasr.training import loop, selection, stages
from fedasr.training.checkpoint import Checkpointer, read_metadata, restore_params
from fedasr.training.config import Config, default_config
from fedasr.training.evaluation import Evaluator
from fedasr.training.logging import read_metrics, to_json
from fedasr.training.selection import Selection
from fedasr.training.session import Interrupted


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    def noise(number):
        return 0.1 * np.random.default_rng(number).standard_normal(8_000, np.float32), 16_000

    utterances = [
        Utterance(f"{split}{user}-{i}", f"{split}{user}", "one two", split, lambda i=i: noise(i))
        for split, users in {"seed": 1, "train": 4, "dev": 1, "test": 1}.items()
        for user in range(users)
        for i in range(2)
    ]
    directory = tmp_path_factory.mktemp("selection") / "data"
    prepare(utterances, directory, name="noise")
    return directory


def configure(corpus, **changes):
    config = default_config()
    config.data.dir = str(corpus)
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    config.update(rounds=6, cohort=2, chunk=1, devices=1)
    config.client.update(steps=1, batch_size=2)
    config.central.update(steps=6, batch_size=2)
    config.evaluation.update(every=1, every_steps=1, batch_size=2)
    config.checkpoint.every = 1
    config.selection.split = "dev"
    config.update_from_flattened_dict(changes)
    return to_json(config.to_dict())


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)


@pytest.fixture
def rates(monkeypatch):
    """rates([...]): the error rates on dev, one for each evaluation after the first of the run.

    They belong to the parameters: an evaluation that is repeated gives the same.
    """

    def set_to(values):
        known, left = {}, list(values)

        def decoded(self, params, corpus, rows=None):
            leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
            if (key := hash(tuple(leaves))) not in known:
                known[key] = left.pop(0)
            return [], known[key]

        def rates(self, decoded, loss):
            return {"wer": loss, "cer": 1.0, "loss": loss / 10}

        monkeypatch.setattr(Evaluator, "decoded", decoded)
        monkeypatch.setattr(Evaluator, "rates", rates)
        return known

    return set_to


@pytest.mark.parametrize("algorithm", ["federated", "central"])
def test_the_best_is_kept_and_reported(corpus, rates, tmp_path, algorithm):
    rates([90.0, 80.0, 50.0, 60.0, 50.0, 70.0, 85.0])
    summary = loop.run(configure(corpus, algorithm=algorithm), tmp_path / "run")
    assert summary["wer"]["dev"] == summary["wer"]["test"] == 50.0
    chosen = summary["selection"]
    assert (chosen["units"], chosen["of"], chosen["stopped_early"]) == (2, 6, False)
    metadata = read_metadata(tmp_path / "run")
    assert metadata["selection"]["units"] == 2
    best, last = (restore_params(tmp_path / "run" / where) for where in ("best", "checkpoints/6"))
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "run"), best)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (best, last)), strict=True))
    evaluated = [r["eval"]["dev"]["wer"] for r in read_metrics(tmp_path / "run") if "eval" in r]
    assert evaluated[-6:] == [80.0, 50.0, 60.0, 50.0, 70.0, 85.0]


def test_training_ends_when_there_is_nothing_better_and_users_are_charged_for_all(
    corpus, rates, tmp_path
):
    rates([90.0, 50.0, 80.0, 60.0, 40.0, 41.0, 42.0])
    config = configure(corpus, **{"selection.patience": 2})
    summary = loop.run(config, tmp_path / "run")
    assert summary["status"] == "completed" and summary["rounds"] == 3
    assert summary["selection"]["stopped_early"] and summary["selection"]["units"] == 1
    planned = loop.run(configure(corpus, **{"selection.split": ""}), tmp_path / "planned")
    assert planned["rounds"] == 6
    ours, theirs = summary["privacy"], planned["privacy"]
    assert ours["epsilon"] == theirs["epsilon"]
    assert ours["extrapolations"][0]["epsilon"] == theirs["extrapolations"][0]["epsilon"]
    said = set(ours["not_covered"]) - set(theirs["not_covered"])
    assert len(said) == 1 and "'dev'" in said.pop()
    # The ledger of what is handed on, too: whoever starts from it is told of all rounds.
    for where in ("best", "checkpoints/3"):
        (entry,) = read_metadata(tmp_path / "run" / where)["ledger"]["own"]
        assert entry["rounds"] == 6
    # The same command again: there is nothing left to do.
    assert loop.run(config, tmp_path / "run") == summary


def test_the_first_state_costs_all_rounds_and_no_checkpoint_knows_more_than_the_best(
    corpus, rates, tmp_path, monkeypatch
):
    """That nothing was better is known from all rounds; a run killed between two saves keeps it."""
    rates([10.0, 50.0])
    calls = []
    settle, save = Selection.settle, Checkpointer.save

    def settling(self):
        calls.append("settle")
        settle(self)

    def saving(self, *args):
        calls.append(self.directory.name)
        save(self, *args)

    monkeypatch.setattr(Selection, "settle", settling)
    monkeypatch.setattr(Checkpointer, "save", saving)
    config = configure(corpus, **{"selection.patience": 1})
    summary = loop.run(config, tmp_path / "run")
    assert (summary["selection"]["units"], summary["rounds"]) == (0, 1)
    (entry,) = read_metadata(tmp_path / "run" / "best")["ledger"]["own"]
    assert entry["rounds"] == 6
    own = [i for i, name in enumerate(calls) if name == "checkpoints"]
    assert len(own) == 2 and all(calls[i - 1] == "settle" for i in own)


class StopAfter:
    """Asks to stop when it was asked so often whether to."""

    def __init__(self, checks):
        self._left = checks

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(("algorithm", "stopped"), [("federated", 2), ("central", 0)])
def test_a_resumed_run_keeps_the_same(corpus, rates, tmp_path, monkeypatch, algorithm, stopped):
    config = configure(corpus, algorithm=algorithm)
    config["selection"]["patience"] = 3
    rates([90.0, 80.0, 50.0, 60.0, 55.0, 70.0, 45.0])
    whole = loop.run(config, tmp_path / "whole")
    assert whole["selection"]["units"] == 2 and whole["selection"]["of"] == 5

    @contextlib.contextmanager
    def stop():
        yield StopAfter(stopped)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "graceful_stop", stop)
        with pytest.raises(Interrupted):
            loop.run(config, tmp_path / "parts")
    parts = loop.run(config, tmp_path / "parts")
    for key in whole.keys() - {"wall_seconds", "client_steps_per_second"}:
        assert parts[key] == whole[key], key
    pair = (restore_params(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, *pair)


def state(value):
    return ServerState({"w": np.float32([value])}, (), np.int32(0))


def test_ties_go_to_the_lower_loss_then_to_the_earlier(tmp_path):
    config = Config.of(configure("nowhere"))
    one = Selection(config, tmp_path, False)
    for units, (wer, loss) in enumerate([(50, 2), (50, 1), (50, 1), (50, float("nan")), (60, 0)]):
        one.offer(units, {"dev": {"wer": wer, "loss": loss}}, state(units), {})
    assert one.best == (1, 50.0, 1.0)
    assert one.chosen(state(9)).params["w"] == 1
    one.close()
    again = Selection(config, tmp_path, True)
    assert again.best == (1, 50.0, 1.0)
    again.close()
    fresh = Selection(config, tmp_path, False)  # the folder is of a start that came to nothing
    assert fresh.best is None and not list((tmp_path / "best").iterdir())
    fresh.close()


@pytest.mark.parametrize("how", ["lost", "damaged", "earlier"])
def test_a_best_state_that_is_lost_is_not_replaced_by_another(corpus, rates, tmp_path, how):
    """What went on without would keep another state than an undisturbed run, and not say so."""
    rates([90.0, 80.0, 50.0, 60.0, 55.0, 70.0, 85.0])
    config, folder = configure(corpus), tmp_path / "run"
    expected = loop.run(config, folder)["selection"]
    assert read_metadata(folder / "checkpoints" / "6")["best"] == 2
    whole = restore_params(folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "6")
    best = folder / "best"
    if how == "lost":
        shutil.rmtree(best)
    elif how == "damaged":
        for file in best.rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(file.read_bytes()[:-1])
    else:  # of before the checkpoint
        (best / "2").rename(best / "1")
        file = best / "1" / "metadata" / "metadata"
        text = json.loads(file.read_text())
        text["selection"]["units"] = 1
        file.write_text(json.dumps(text))
        shutil.rmtree(best / "1" / "checksums")
    with pytest.raises(UserError, match=r"is lost .* or, to train again from the start") as caught:
        loop.run(config, folder)
    shutil.rmtree(str(caught.value).split("remove ")[-1])
    assert loop.run(config, folder)["selection"] == expected
    jax.tree.map(np.testing.assert_array_equal, restore_params(folder), whole)


MISTAKES = {
    "needs selection.split": {"selection.split": "", "selection.patience": 2},
    "evaluated while training": {"evaluation.while_training": ()},
    "set evaluation.every": {"evaluation.every": 0},
    "local.patterns": {"local.patterns": ("input",), "model.options.input_layer": True},
}


@pytest.mark.parametrize("match", MISTAKES)
def test_mistakes(corpus, tmp_path, match):
    config = configure(corpus, **MISTAKES[match])
    for act in (loop.dry_run, lambda config: loop.run(config, tmp_path / "run")):
        with pytest.raises(UserError, match=match):
            act(config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_choice_by_users_who_train_is_refused_with_privacy(corpus, tmp_path):
    changes = {"data.eval": ("train",), "evaluation.while_training": ("train",)}
    config = configure(corpus, **changes, **{"selection.split": "train"})
    with pytest.raises(UserError, match="4 of its users"):
        loop.run(config, tmp_path / "run")
    config["privacy"]["enabled"] = False
    loop.dry_run(config)


def test_what_is_said_goes_with_the_setting():
    config = Config.of(configure("nowhere"))
    assert any("'dev'" in text for text in selection.not_covered(config))
    other = dataclasses.replace(config.selection, split="")
    assert selection.not_covered(dataclasses.replace(config, selection=other)) == []
