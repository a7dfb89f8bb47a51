"""What a run takes of another one that was trained for something else."""

import dataclasses

import jax
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.models.best_rq import OBJECTIVE
from fedasr.training import starts
from fedasr.training.builders import models
from fedasr.training.checkpoint import Checkpointer
from fedasr.training.config import Config, default_config
from fedasr.training.logging import to_json

TINY = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16, "prediction_dim": 8, "joint_dim": 8}


def config_for(seed=0, peft="full", **options):
    tree = to_json(default_config().to_dict())
    tree["model"]["options"] |= TINY | options
    tree["peft"]["kind"] = peft
    return dataclasses.replace(Config.of(tree), seed=seed)


def initial(config):
    return jax.device_get(models.initial_params(models.build_recogniser(config), config))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of masked prediction: its folder, and its parameters."""
    config = config_for(seed=1, objective=OBJECTIVE, codes=40)
    folder, params = tmp_path_factory.mktemp("run"), initial(config)
    with Checkpointer(folder / "checkpoints") as writer:
        metadata = {"stage": "main", "units": 3, "config": config.tree()}
        writer.save(3, {"params": params}, metadata)
        writer.wait()
    return folder, params


def begun(config, folder, out):
    config = dataclasses.replace(config, init_from=str(folder))
    return jax.device_get(starts.read_start(config, None, out / "new"))


@pytest.mark.parametrize("objective", ["ctc", "rnnt"])
def test_an_encoder_that_predicted_codes_gets_a_new_output_layer(objective, pretrained, tmp_path):
    folder, theirs = pretrained
    config = config_for(objective=objective)
    found, fresh = begun(config, folder, tmp_path), initial(config)
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    for name in found.keys() & theirs.keys() - {"output"}:
        jax.tree.map(np.testing.assert_array_equal, found[name], theirs[name])
    for name in {"output", *(found.keys() - theirs.keys())}:
        jax.tree.map(np.testing.assert_array_equal, found[name], fresh[name])
    assert not np.array_equal(theirs["front_end"]["kernel"], fresh["front_end"]["kernel"])


def test_it_may_be_adapted_or_go_on_as_it_is(pretrained, tmp_path):
    folder, theirs = pretrained
    found = begun(config_for(peft="lora"), folder, tmp_path)
    np.testing.assert_array_equal(found["front_end"]["kernel"], theirs["front_end"]["kernel"])
    same = begun(config_for(objective=OBJECTIVE, codes=40), folder, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, same, theirs)
    with pytest.raises(UserError, match=r"another model: .*output"):
        begun(config_for(objective=OBJECTIVE, codes=41), folder, tmp_path)
