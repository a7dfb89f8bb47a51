"""The study of recalibration as published beside ours, shrunken: everything runs and is drawn."""

import json

import pytest

from experiments.brain_recalibration import ARMS, summarize

TINY = (
    "--config.train_days=2",
    "--config.recordings.days=3",
    "--config.recordings.train_sentences=4",
    "--config.recordings.test_sentences=2",
    "--config.recordings.holdout_sentences=1",
    "--config.recordings.electrodes=4",
    "--config.recordings.informative=4",
    "--config.areas=tx1[0:4],spikePow[0:4]",
    "--config.model.units=4",
    "--config.model.layers=1",
    "--config.training.steps=4",
    "--config.language.sentences=50",
    "--config.language.beam=2",
    "--config.language.lm_weights=(0.5,)",
    "--config.language.word_bonuses=(0.0,)",
    "--config.recalibration.steps=2",
    "--config.published.batch_size=4",
    "--config.published.threshold=1e6",
    "--config.commands.steps=4",
    "--config.commands.rounds=1",
    "--config.commands.batch_size=2",
)


@pytest.mark.long
def test_the_study_runs_and_draws(program, tmp_path):
    pytest.importorskip("scipy", reason="scipy is not installed")
    plot = tmp_path / "plot.png"
    command = ("experiments.brain_recalibration", *TINY, f"--workdir={tmp_path / 'run'}", "--json")
    done = program(*command, "--seeds=1", f"--plot={plot}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seeds"] == [1] and set(found["commands"]) == {"central", "federated"}
    assert found["arms"]["published"]["steps"]["values"] == [8]  # two after each of four sentences
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_means_are_over_the_seeds():
    def seed(value):
        names = ("cer", "as decoded", "training days", "steps", "fewest steps", "seconds")
        arm = dict.fromkeys(names, value) | {"cer_by_day": [value, 2 * value]}
        return {arm_name: arm for arm_name in ARMS} | {
            "commands": {"central": value, "federated": 0.0}
        }

    found = summarize({0: seed(1.0), 1: seed(3.0)})
    assert found["arms"]["ours"]["cer"]["mean"] == 2 and found["arms"]["ours"]["cer"]["std"] > 1
    assert found["cer_by_day"]["fixed"] == [2, 4]
    assert found["commands"]["central"]["values"] == [1, 3]
