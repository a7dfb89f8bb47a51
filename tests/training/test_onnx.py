"""Graphs that onnxruntime runs, against the recogniser itself."""

import json

import jax
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.training import onnx
from fedasr.training.builders import models
from fedasr.training.config import Config, default_config
from fedasr.training.logging import to_json

SMALL = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16}


def config_of(name, **options):
    tree = to_json(default_config().to_dict())
    tree["model"] = {"name": name, "options": SMALL | options}
    return Config.of(tree)


def initial(config):
    return jax.device_get(models.initial_params(models.build_recogniser(config), config))


@pytest.mark.parametrize("name", ["transformer", "conformer"])
def test_a_graph_scores_as_the_recogniser_does(name, tmp_path, monkeypatch):
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(onnx, "SECONDS", 1.0)
    config = config_of(name)
    params = initial(config)
    try:
        onnx.write(config, params, {"characters": "ab"}, tmp_path)
    except UserError as error:
        if isinstance(error.__cause__, AttributeError) and "jax._src" in str(error):
            pytest.skip(f"jax2onnx does not know this JAX: {error.__cause__}")
        raise
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    frames = json.loads((tmp_path / "config.json").read_text())["inputs"]["features"][1]
    for length in (frames, frames - 31):
        features = np.zeros((1, frames, 80), np.float32)
        features[0, :length] = np.random.default_rng(0).normal(size=(length, 80))
        inputs = {"features": features, "features_length": np.int32([length])}
        log_probs, count = session.run(["log_probs", "log_probs_length"], inputs)
        expected, true = onnx.scores_alone(config, params, frames, 80)(*inputs.values())
        assert count == true
        np.testing.assert_allclose(
            log_probs[0, : count[0]], expected[0, : count[0]], rtol=1e-4, atol=1e-4
        )


def test_what_no_graph_holds(tmp_path, monkeypatch):
    config = config_of("transformer", objective="rnnt")
    with pytest.raises(UserError, match="objective 'ctc'"):
        onnx.scores_alone(config, None, 10, 80)
    monkeypatch.setitem(__import__("sys").modules, "jax2onnx", None)
    with pytest.raises(UserError, match="needs jax2onnx"):
        onnx.write(config, None, {}, tmp_path)
