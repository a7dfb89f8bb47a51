"""The corrections experiment, shrunken: a model that knows nothing, filters that let all pass."""

import json

import pytest

from fedasr.errors import UserError

TINY = (
    "--config.model.options.dim=16",
    "--config.model.options.mlp=16",
    "--config.model.options.blocks=1",
    "--config.model.options.heads=2",
    "--config.seed_training.steps=3",
    "--config.rounds=2",
    "--config.cohort=2",
    "--config.client.steps=1",
    "--config.corrections.filters.max_changed=1.0",
    "--config.corrections.filters.min_similarity=0.0",
    "--config.corrections.filters.trusted=0.0",
    "--config.corrections.quality.utterances=2",
    "--config.corrections.central_steps=1",
    *(f"--config.corrections.corpus.{split}_users=3" for split in ("seed", "train", "dev", "test")),
    *(
        f"--config.corrections.corpus.{split}_utterances=(6,7)"
        for split in ("seed", "train", "dev", "test")
    ),
)


@pytest.mark.long
def test_the_experiment_runs_goes_on_and_draws(program, tmp_path, monkeypatch):
    pytest.importorskip("soxr", reason="soxr is not installed")
    try:
        from fedasr.data.synthetic import espeak

        espeak.engine()
    except UserError as error:
        pytest.skip(f"no speech engine: {error}")
    monkeypatch.setenv("FEDASR_CACHE", str(tmp_path / "cache"))
    command = ("experiments.corrections", *TINY, f"--workdir={tmp_path}/run", "--seeds=0", "--json")
    first = program(*command, "--systems=private")
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    assert set(found["test"]) == {"stale", "private", "private+"}
    for row in found["test"].values():
        assert set(row) == {"fresh", "rare", "general", "rare_missed"}
    assert 0 <= found["filters"]["right_kept"]["mean"] <= 1
    (privacy,) = found["privacy"]
    assert privacy["deployed"][0]["epsilon"] < privacy["simulated"]["epsilon"]

    plot = tmp_path / "plot.png"
    again = program(*command, "--systems=private", f"--plot={plot}")
    assert again.returncode == 0, again.stderr
    assert "round" not in again.stderr and "step" not in again.stderr  # nothing is done twice
    assert json.loads(again.stdout.splitlines()[-1]) == found
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"), [("--systems=magic", "magic"), ("--seeds=one", "whole numbers")]
)
def test_mistakes_are_one_line(program, flag, message):
    done = program("experiments.corrections", flag)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
