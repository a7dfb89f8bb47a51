"""A model from Hugging Face, adapted here, as a folder that `transformers` loads."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is torch: pip install torch transformers")
pytest.importorskip("transformers", reason="the oracle is transformers")
pytest.importorskip("safetensors", reason="exporting needs safetensors")

import torch
import transformers

from fedasr.errors import UserError
from fedasr.models import peft
from fedasr.models.peft.kind import insert, leaves_by_path
from fedasr.training.builders import models, pretrained
from fedasr.training.checkpoint import Checkpointer, restore_params
from fedasr.training.config import Config
from fedasr.training.exporting import export
from fedasr.training.sections import Peft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=10,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    out = tmp_path_factory.mktemp("wav2vec2") / "model"
    transformers.Wav2Vec2ForCTC(config).save_pretrained(out)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """(configuration, parameters with factors that have moved, work directory)."""
    adaptation = Peft(kind="ffa_lora", rank=2)
    config = pretrained.resolved(Config(init_from=f"hf:{folder}", peft=adaptation))
    base = pretrained.read_params(config, models.base_shapes(config))
    params = jax.device_get(models.completed(base, config))
    rng = np.random.default_rng(0)
    moved = {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in leaves_by_path(params).items()
        if path.endswith("_lora_b")
    }
    assert len(moved) == 8
    params = insert(params, moved)
    out = tmp_path_factory.mktemp("run")
    metadata = {"stage": "main", "units": 1, "config": config.tree(), "ledger": None}
    with Checkpointer(out / "checkpoints") as writer:
        writer.save(1, {"params": params}, metadata)
        writer.wait()
    return config, params, out


def test_transformers_computes_what_the_adapted_model_does(run, folder, tmp_path):
    config, params, workdir = run
    export(workdir, tmp_path / "out", "huggingface")
    theirs = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out").eval()
    hear = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "out")
    audio = (3000 * np.random.default_rng(1).normal(size=1600)).astype(np.int16)
    with torch.no_grad():
        waveform = audio.astype(np.float32) / 32768
        inputs = hear(waveform, sampling_rate=16000, return_tensors="pt").input_values
        logits = theirs(inputs).logits[0]
        before = transformers.Wav2Vec2ForCTC.from_pretrained(folder).eval()(inputs).logits[0]
    expected = torch.log_softmax(logits, -1).numpy()
    batch = {
        "features": audio.reshape(1, -1, 160),
        "features_length": np.int32([10]),
        "samples": np.int32([1600]),
        "labels": np.ones((1, 2), np.int32),
        "labels_length": np.int32([2]),
        "mask": np.ones(1, bool),
    }
    found, count, *_ = jax.jit(models.build_recogniser(config).scores)(params, batch)
    np.testing.assert_allclose(found[0, : int(count[0])], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(torch.log_softmax(before, -1).numpy() - expected).max() > 1e-2
    # Read again it is the merged model, and a folder for the importer.
    again = pretrained.resolved(Config(init_from=f"hf:{tmp_path / 'out'}"))
    base = pretrained.read_params(again, models.base_shapes(again))
    merged = peft.merged(restore_params(workdir), peft.PeftConfig("ffa_lora", rank=2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), jax.device_get(merged))


def test_models_of_which_there_is_no_such_folder(run, tmp_path):
    config, params, _ = run
    tree = dataclasses.replace(config, init_from="").tree()
    with Checkpointer(tmp_path / "checkpoints") as writer:
        writer.save(1, {"params": params}, {"stage": "main", "units": 1, "config": tree})
        writer.wait()
    with pytest.raises(UserError, match="init_from=hf:FOLDER"):
        export(tmp_path, tmp_path / "out", "huggingface")
