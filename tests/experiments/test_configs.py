"""Configurations train: one round of a shrunken model on users of noise.

`quickstart` and `mini` are run by other tests, `librispeech` has `common_voice`'s recipe and
`large_asr` is `phone` without compression, partial training and privacy.
"""

import importlib

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.recipes import librispeech
from fedasr.text import CharTokenizer
from fedasr.training import loop, stages
from fedasr.training.logging import to_json

ARGUMENTS = {
    "common_voice": "",
    "phone": "size=large",
    "rnnt": "",
}
SMALL = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16, "conv_kernel": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus") / "data"

    def noise(number):
        return 0.1 * np.random.default_rng(number).standard_normal(8_000, np.float32), 16_000

    utterances = [
        Utterance(f"{split}{user}-{i}", f"{split}{user}", "one two", split, lambda i=i: noise(i))
        for split, users in {"seed": 1, "train": 3, "dev": 1}.items()
        for user in range(users)
        for i in range(2)
    ]
    prepare(utterances, directory, name="noise")
    return directory


@pytest.mark.long
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_shrunken_round(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "write_report", lambda workdir: None)
    module = importlib.import_module(f"fedasr.recipes.{name}")
    config = module.get_config(ARGUMENTS[name]) if ARGUMENTS[name] else module.get_config()
    options = config.model.options
    options.update({key: value for key, value in SMALL.items() if key in options})
    options.vocab = CharTokenizer().vocab_size
    config.data.update(dir=str(corpus), train="train", eval=(), population=0, buckets=1)
    config.evaluation.update(while_training=(), batch_size=2)
    config.seed_training.update(split="seed", steps=min(1, config.seed_training.steps))
    config.seed_training.update(batch_size=2, batch_seconds=0.0)
    config.update(rounds=1, cohort=2, chunk=1, init_from="")
    config.client.batch_size = min(2, config.client.batch_size)
    config.client.max_steps = 1 if config.client.epochs else 0
    config.client.steps = 0 if config.client.epochs else 1
    config.privacy.deployments = ()
    summary = loop.run(to_json(config.to_dict()), tmp_path / "run")
    assert summary["status"] == "completed" and summary["rounds"] == 1
    assert summary["invalid_client_updates"] == 0
    assert summary["clients"][-1]["up_bytes"] > 0


def test_the_argument_for_accelerators_changes_how_the_model_is_computed_alone():
    config, other = (librispeech.get_config(f"accelerator={x}").to_dict() for x in (False, True))
    options, changed = config["model"].pop("options"), other["model"].pop("options")
    assert config == other
    assert {k: v for k, v in changed.items() if v != options.get(k)} == {
        "scan_blocks": True,
        "generator": "hashed",
        "stream_dtype": "",
    }


@pytest.mark.slow
def test_neural_recordings(tmp_path):
    """From MATLAB files to a run in which each day has kept a layer of its own."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    from fedasr.data import neural
    from fedasr.data.neural import synthetic as neural_synthetic
    from fedasr.recipes import neural as config_file

    recordings = neural_synthetic.NeuralConfig(
        days=2, train_sentences=3, test_sentences=1, words=(3, 3), electrodes=4, informative=4
    )
    neural_synthetic.generate(recordings, tmp_path / "raw")
    areas = neural.parse_areas("tx1[0:4],spikePow[0:4]")
    source = neural.NeuralSessions(tmp_path / "raw", areas)
    neural.prepare_sessions(source, tmp_path / "data", stride=2)
    config = config_file.get_config("model=handwriting")
    config.model.options.update(units=4, layers=1, features=8)
    config.data.dir = str(tmp_path / "data")
    config.update(rounds=1)
    config.client.batch_size = 2
    summary = loop.run(to_json(config.to_dict()), tmp_path / "run")
    assert summary["status"] == "completed" and summary["local"]["users"] == 2
    assert summary["local"]["parameters"] == 8 * 8 + 8
    assert summary["wer"].keys() == {"test"}
    for wrong, words in (
        ({"model.options.features": 9}, "features=8"),
        ({"model.options.vocab": 41}, "vocab=30"),
        ({"client.batch_seconds": 2.0}, "batch_seconds"),
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(wrong)
        with pytest.raises(UserError, match=words):
            loop.run(to_json(other.to_dict()), tmp_path / "wrong")
