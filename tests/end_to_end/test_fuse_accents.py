"""The experiment on accents, shrunken: everything runs, goes on, and is drawn."""

import json

import pytest

from fedasr.errors import UserError

SPLITS = ("seed", "train", "dev", "test")
TINY = (
    "--config.model.options.dim=16",
    "--config.model.options.mlp=16",
    "--config.model.options.blocks=1",
    "--config.model.options.heads=2",
    "--config.seed_training.steps=3",
    "--config.rounds=3",
    "--config.cohort=2",
    "--config.client.steps=1",
    "--config.accents.every=2",
    "--config.accents.evaluations=6",
    "--config.accents.evaluations_between=3",
    "--config.accents.population=3",
    "--config.accents.by_module=True",
    *(f"--config.accents.corpus.{split}_users=8" for split in SPLITS),
    *(f"--config.accents.corpus.{split}_utterances=(2,2)" for split in SPLITS),
    "--config.accents.corpus.train_users=16",
    "--config.accents.seed_share=0.2",
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
    command = ("experiments.fuse_accents", *TINY, f"--workdir={tmp_path}/run", "--seeds=0")
    command = (*command, "--privacy=private", "--methods=m2n2", "--between=m2n2", "--json")
    first = program(*command)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout.splitlines()[-1])["private"]
    models = {"seed", "british", "other", "union", "average", "m2n2", "m2n2 between rounds"}
    assert set(found["wer"]) == models
    for row in found["wer"].values():
        assert set(row) == {"british", "other", "all"}
    assert found["search"][0]["m2n2"]["evaluations"][-1] == 6
    assert "fused at round 2" in first.stderr and "fused at round 3" in first.stderr
    # The union has twice the users and twice the cohort.
    epsilons = {name: spent["epsilon"] for name, spent in found["privacy"][0].items()}
    assert epsilons.keys() == {"british", "other", "union"}
    assert 0 < epsilons["union"] < min(epsilons["british"], epsilons["other"])

    plot = tmp_path / "plot.png"
    again = program(*command, f"--plot={plot}")
    assert again.returncode == 0, again.stderr
    assert "fused at round" not in again.stderr  # nothing is done twice
    assert json.loads(again.stdout.splitlines()[-1])["private"] == found
    assert plot.read_bytes().startswith(b"\x89PNG")
