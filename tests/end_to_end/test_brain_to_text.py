"""The experiment on recording days, shrunken: everything runs, goes on, and is drawn."""

import json
import math

import pytest

from experiments.brain_to_text import open_bench, summarize
from experiments.configs.brain_to_text import get_config
from fedasr.errors import UserError

TINY = (
    "--config.train_days=2",
    "--config.recordings.days=4",
    "--config.recordings.train_sentences=4",
    "--config.recordings.test_sentences=2",
    "--config.recordings.holdout_sentences=1",
    "--config.recordings.words=(3,3)",
    "--config.recordings.electrodes=4",
    "--config.recordings.informative=4",
    "--config.areas=tx1[0:4],spikePow[0:4]",
    "--config.model.units=4",
    "--config.model.layers=1",
    "--config.model.window=2",
    "--config.training.steps=4",
    "--config.training.batch_size=2",
    "--config.federated.rounds=2",
    "--config.federated.cohort=2",
    "--config.federated.batch_size=2",
    "--config.language.sentences=50",
    "--config.language.beam=2",
    "--config.language.lm_weights=(0.5,)",
    "--config.language.word_bonuses=(0.0,)",
    "--config.calibration.days=1",
    "--config.calibration.sentences=2",
    "--config.calibration.steps=2",
    "--config.recalibration.portion=4",
    "--config.recalibration.steps=2",
    "--config.recalibration.batch_size=2",
)


@pytest.mark.long
def test_the_experiment_runs_goes_on_and_draws(program, tmp_path):
    pytest.importorskip("scipy", reason="scipy is not installed")
    workdir, plot = tmp_path / "run", tmp_path / "plot.png"
    command = ("experiments.brain_to_text", *TINY, f"--workdir={workdir}", "--json")
    first = program(*command, "--seeds=1")
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    assert found["seeds"] == [1]
    for name in ("cer, one layer for all", "cer, federated by day", "cer, later days, fixed"):
        assert len(found["rows"][name]["values"]) == 1
    days = {name: len(values) for name, values in found["cer_by_day"].items()}
    assert days == {"fixed": 2, "past only": 2, "recalibrated": 2, "training days": 2}
    assert found["sentences"] == {"central": 8, "federated": 16}

    # Nothing is done twice, and another setting redoes what depends on it, in the same folder.
    kept = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.json")}
    again = program(*command, "--seeds=1", f"--plot={plot}")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == found
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert plot.read_bytes().startswith(b"\x89PNG")
    change = ("--config.federated.rounds=1", "--config.calibration.steps=1")
    other = program(*command, "--seeds=1", *change)
    assert other.returncode == 0, other.stderr
    changed = {path.name for path in kept if path.stat().st_mtime_ns != kept[path]}
    assert changed == {"federated-rates.json", "calibration.json"}


def test_a_model_without_errors_has_no_ratios():
    rates = {"cer": 0.0, "wer": 0.0, "wer_greedy": 0.0, "cer_by_day": [0.0]}
    arm = {"cer": {"mean": 1.0, "by_day": [1.0]}, "training days": 0.0}
    arms = {name: arm for name in ("fixed", "past only", "recalibrated")}
    found = {
        **{name: rates for name in ("days", "shared", "federated", "beam")},
        "calibration": {
            "training days": 0.0,
            "before": 1.0,
            "labels": 0.7,
            "calibrated": 0.5,
            "trained": 0.0,
        },
        "drift": arms | {"unknown_words": 0.0, "as decoded": 0.0},
    }
    config = get_config().to_dict()
    rows = summarize({0: found}, config)["rows"]
    assert math.isnan(rows["federated / central"]["mean"])
    for name in ("calibrated / trained", "labels alone / trained", "calibrated / training days"):
        assert math.isnan(rows[name]["mean"])
    assert rows["fixed / recalibrated"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [(None, {"train_days": 22}, "train_days"), ("calibration", {"days": 0}, "calibration.days")],
)
def test_days_that_there_are_not(section, values, said, tmp_path):
    config = get_config().to_dict()
    (config[section] if section else config).update(values)
    with pytest.raises(UserError, match=said):
        open_bench(config, 0, tmp_path, print)
    assert not list(tmp_path.iterdir())
