"""Configurations train: one round of a shrunken model on users of noise.

`quickstart` and `mini` are run by other tests, `librispeech` has `common_voice`'s recipe and
`large_asr` is `phone` without compression, partial training and privacy.
"""

import importlib

import numpy as np
import pytest

from fedasr.data.prepare import Utterance, prepare
from fedasr.text import CharTokenizer
from fedasr.training import loop
from fedasr.training.logging import to_json

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_shrunken_round(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda workdir: None)
    module = importlib.import_module(f"experiments.configs.{name}")
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
