"""Runs that start from a pretrained model's folder, written by hand with random weights."""

import json
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="pretrained models need safetensors")
pytest.importorskip("array_record")
pytest.importorskip("tensorflow_datasets")

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.models.pretrained import export_folder, folders
from fedasr.models.recogniser import make_recogniser
from fedasr.recipes import adapted
from fedasr.text import CHARACTERS
from fedasr.training import loop, stages, starts
from fedasr.training.builders import models, pretrained, whole
from fedasr.training.checkpoint import restore_params
from fedasr.training.config import Config, default_config
from fedasr.training.logging import to_json
from fedasr.training.sections import Model

TINY = {
    "vocab": 30,
    "dim": 8,
    "blocks": 2,
    "heads": 2,
    "mlp": 8,
    "convolutions": "4,4",
    "widths": "10,8",
    "strides": "10,16",
    "position_width": 3,
    "position_groups": 2,
}
SAMPLES = (8000, 7900)


def noise(number):
    samples = SAMPLES[number % 2]
    return 0.1 * np.random.default_rng(number).standard_normal(samples, np.float32), 16_000


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same noise stored as audio, and as features."""
    folder = tmp_path_factory.mktemp("data")
    for store in ("audio", "features"):
        utterances = [
            Utterance(
                f"{split}-{user}-{i}", f"{split}-{user}", "one two", split, lambda i=i: noise(i)
            )
            for split, users in {"train": 4, "dev": 1, "test": 1}.items()
            for user in range(users)
            for i in range(2)
        ]
        prepare(utterances, folder / store, name="noise", store=store)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A wav2vec 2.0 that writes the 29 characters."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    params = make_recogniser("wav2vec2", TINY).init(jax.random.key(1))
    export_folder(Model("wav2vec2", TINY), params, {"characters": CHARACTERS}, folder)
    return folder


@pytest.fixture
def configure(corpora, folder, monkeypatch):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)

    def make(**changes):
        config = default_config()
        config.data.dir = str(corpora / "audio")
        config.init_from = f"hf:{folder}"
        config.rounds, config.cohort, config.seed_training.steps = 2, 2, 4
        config.client.steps, config.client.batch_size = 1, 2
        config.partial.mode, config.partial.patterns = "fixed", ("^output/", "block_1/")
        config.evaluation.batch_size = 2
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        return to_json(config.to_dict())

    return make


def read(folder, config):
    """The folder's parameters and the options that a configuration has."""
    source = folders.open_source(folder)
    options = config["model"]["options"]
    shapes = jax.eval_shape(make_recogniser("wav2vec2", options).init, jax.random.key(0))
    return source.params(options, shapes), options


def test_private_rounds_of_a_part_then_evaluation_and_resume(
    configure, folder, corpora, tmp_path, monkeypatch
):
    config = configure(chunk=2, privacy__sigma=1e-3)
    summary = loop.run(config, tmp_path / "run")
    assert summary["status"] == "completed" and summary["invalid_client_updates"] == 0
    assert any("init_from=hf:" in line for line in summary["privacy"]["not_covered"])
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["model"]["name"] == "wav2vec2"
    start, _ = read(folder, recorded)
    trained = restore_params(tmp_path / "run")
    moved = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), trained, start)
    assert moved["output"]["kernel"] > 0 and moved["encoder"]["block_1"]["mlp"]["up"]["bias"] > 0
    fixed = {k: v for k, v in moved["encoder"].items() if k != "block_1"}
    assert max(jax.tree.leaves([fixed, moved["front_end"], moved["projection"]])) == 0
    # What a run has begun with is not needed again.
    gone = folder.rename(folder.with_name("gone"))
    try:
        assert loop.run(config, tmp_path / "run") == summary
        (tmp_path / "run" / "summary.json").unlink()
        again = loop.run(config, tmp_path / "run")
        assert again["wer"] == summary["wer"]
        # Nor in cloud storage.
        shutil.copytree(tmp_path / "run", tmp_path / "there" / "run")
        url = f"file://{tmp_path}/there/run"
        assert loop.dry_run(config, url)["config"]["model"]["name"] == "wav2vec2"
        assert loop.run(config, url) == again
    finally:
        gone.rename(folder)


def test_frozen_variables_in_half_precision(configure, corpora, tmp_path):
    config = configure(rounds=1, partial__mode="all")
    config["peft"] |= {"kind": "head", "patterns": ["^output/", "block_1/"]}
    config["peft"]["frozen_dtype"] = "bfloat16"
    summary = loop.run(config, tmp_path / "run")
    assert summary["status"] == "completed"
    params = restore_params(tmp_path / "run")
    assert params["encoder"]["block_0"]["mlp"]["up"]["kernel"].dtype == jax.numpy.bfloat16
    assert params["encoder"]["block_1"]["mlp"]["up"]["kernel"].dtype == np.float32
    assert loop.run(config, tmp_path / "run") == summary


def test_a_new_output_layer(configure, folder, tmp_path):
    config = configure(init_from=f"hf-encoder:{folder}", seed=3)
    typed = whole.checked(config)
    start = starts.read_start(typed, None, tmp_path)
    (whole_start, _) = read(folder, typed.tree())
    np.testing.assert_array_equal(
        start["projection"]["kernel"], whole_start["projection"]["kernel"]
    )
    drawn = models.build_recogniser(typed).init
    assert start["output"]["kernel"].shape == whole_start["output"]["kernel"].shape
    assert np.abs(start["output"]["kernel"] - whole_start["output"]["kernel"]).max() > 0.01
    again = starts.read_start(typed, None, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, start, again)
    other = starts.read_start(whole.checked(config | {"seed": 4}), None, tmp_path)
    assert np.abs(start["output"]["kernel"] - other["output"]["kernel"]).max() > 0.01
    assert drawn is not None


def test_options_of_compute_are_the_configurations(configure):
    config = configure(model__options__dropout=0.25, model__options__dim=64)
    typed = whole.checked(config)
    assert typed.model.options["dropout"] == 0.25 and typed.model.options["dim"] == 8
    assert pretrained.resolved(typed) == typed  # of a run's own configuration nothing changes


def test_mistakes_are_one_line(configure, folder, corpora, tmp_path):
    def refused(says, **changes):
        for run in (loop.dry_run, lambda config: loop.run(config, tmp_path / "refused")):
            with pytest.raises(UserError, match=says) as raised:
                run(configure(**changes))
            assert "\n" not in str(raised.value)

    refused("prepare it again, with --store=audio", data__dir=str(corpora / "features"))
    refused("no is not there: give a folder", init_from="hf:no")
    refused("augment.enabled=False", augment__enabled=True)
    refused("is not on a file system", init_from="hf:gs://bucket/model")
    other = shutil.copytree(folder, tmp_path / "other")
    tokens = json.loads((other / "vocab.json").read_text())
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (other / "vocab.json").write_text(json.dumps(tokens))
    refused(
        r"not written with the tokenizer of.*--tokenizer=.*hf-encoder:", init_from=f"hf:{other}"
    )
    refused(
        "the data's alphabet has 30 tokens with the blank, the model 12",
        init_from=f"hf-encoder:{folder}",
        model__options__vocab=12,
    )
    assert not (tmp_path / "refused" / "config.json").exists()


def test_blocks_of_audio(corpora):
    corpus = open_corpus(corpora / "audio", "train", audio=True)
    (example,) = corpus.get(0, [1])
    assert corpus.lengths(0)["features"].tolist() == [50, 50]
    assert example["features"].shape == (50, 160) and example["features"].dtype == np.int16
    assert int(example["samples"]) == 7900 and not example["features"].reshape(-1)[7900:].any()
    stored = np.round(noise(1)[0] * 32768)
    np.testing.assert_allclose(example["features"].reshape(-1)[:7900], stored, atol=1)
    assert Config.of({}).init_from == ""


def test_the_recipe_for_a_pretrained_model(corpora, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)
    arguments = f"data={corpora / 'audio'},model={folder},rounds=2"
    config = adapted.get_config(arguments)
    assert (config.init_from, config.model.name) == (f"hf:{folder}", "wav2vec2")
    assert (config.cohort, config.client.steps, config.rounds) == (2, 1, 2)
    assert config.selection.split == "dev" and config.peft.kind == "ffa_lora"
    config.peft.patterns = ("attention/",)
    config.evaluation.batch_size = 2
    summary = loop.run(to_json(config.to_dict()), tmp_path / "run")
    assert summary["status"] == "completed" and summary["invalid_client_updates"] == 0
    before, after = (
        adapted.get_config(arguments.replace("rounds=2", f"rounds={n}")) for n in (10, 100)
    )
    assert after.privacy.sigma > before.privacy.sigma and after.server.decay_start == 66
    assert adapted.get_config(f"{arguments},window=10").model.options.window == "10"
    nowhere = adapted.get_config("data=nowhere,model=hf-encoder:models/none")
    assert nowhere.init_from == "hf-encoder:models/none"
    small = adapted.get_config("data=nowhere,size=whisper-small,window=10")
    assert small.init_from == "" and small.model.options.dim == 768
    recogniser = make_recogniser(small.model.name, to_json(small.model.options.to_dict()))
    assert models.parameter_count(recogniser) == 241_734_912  # Whisper small
    wrong = {
        "model=x": "data=data/audio",
        "data=x": "model=models/",
        "data=x,model=y,size=whisper-small": "leave one out",
        "data=x,size=whisper-vast": "choose one of wav2vec2-base, whisper-tiny.en",
    }
    for given, named in wrong.items():
        with pytest.raises(UserError, match=named):
            adapted.get_config(given)
