"""The study of self-training, shrunken: a model that knows nothing, filters that let all pass."""

import json

import pytest

from fedasr.errors import UserError

TINY = (
    "--config.model.options.dim=16",
    "--config.model.options.mlp=16",
    "--config.model.options.blocks=1",
    "--config.model.options.heads=2",
    "--config.seed_training.steps=2",
    "--config.rounds=3",
    "--config.cohort=2",
    "--config.client.steps=1",
    "--config.self_training.central_steps=1",
    "--config.self_training.every=2",
    "--config.self_training.confidence=0",
)


@pytest.mark.long
def test_the_study_runs_and_goes_on(program, tmp_path):
    pytest.importorskip("soxr", reason="soxr is not installed")
    try:
        from fedasr.data.synthetic import espeak

        espeak.engine()
    except UserError as error:
        pytest.skip(f"no speech engine: {error}")
    command = (
        "experiments.self_training",
        *TINY,
        f"--workdir={tmp_path}/run",
        "--seeds=0",
        "--json",
    )
    first = program(*command)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    assert set(found["wer"]) == {"start", "labelled", "self", "all"}
    assert [teacher["round"] for teacher in found["teachers"][0]] == [0, 2]
    again = program(*command)
    assert json.loads(again.stdout.splitlines()[-1]) == found
    assert "round" not in again.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--systems=magic", "magic"), ("--config.self_training.labelled=1.0", "labelled must be")],
)
def test_mistakes_are_one_line(program, flag, message):
    done = program("experiments.self_training", flag)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
