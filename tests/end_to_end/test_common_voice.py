"""Recorded speech of many users, from a Common Voice folder to a trained model."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus
from fedasr.data.sources.manifest import read_manifest
from fedasr.training import loop
from fedasr.training.config import default_config
from fedasr.training.logging import read_metrics, to_json


@pytest.fixture(scope="module")
def rows():
    if "FEDASR_TEST_DATA" not in os.environ:
        pytest.skip("FEDASR_TEST_DATA names no folder with recorded speech")
    pytest.importorskip("soundfile", reason="soundfile is needed to read MP3")
    folder = Path(os.environ["FEDASR_TEST_DATA"]) / "common_voice" / "en"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    found = []
    for split in ("train", "dev", "test"):
        with open(folder / f"{split}.tsv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                audio = str(folder / "clips" / row["path"])
                found.append((audio, row["sentence"], row["client_id"], split))
    return found[::6]


@pytest.mark.long
def test_twenty_rounds_on_common_voice(rows, tmp_path):
    manifest = tmp_path / "speech.jsonl"
    keys = ("audio_filepath", "text", "user", "split")
    manifest.write_text(
        "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    )
    prepared = prepare(read_manifest(manifest), tmp_path / "data", name="common voice")
    lost = sum(prepared["skipped"].values())
    assert prepared["utterances"] + lost == len(rows)
    stored = [open_corpus(tmp_path / "data", split) for split in ("train", "dev", "test")]
    assert sum(int(corpus.sizes.sum()) for corpus in stored) == prepared["utterances"]
    assert prepared["utterances"] > 0.9 * len(rows)

    config = default_config()
    config.data.dir = str(tmp_path / "data")
    config.data.eval = ("dev",)
    config.rounds, config.cohort, config.evaluation.every = 20, 4, 0
    config.client.steps, config.client.batch_size = 2, 2
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    config.server.learning_rate = 0.03
    summary = loop.run(to_json(config.to_dict()), tmp_path / "run")
    assert summary["status"] == "completed"
    assert summary["rounds"] == 20
    assert summary["invalid_client_updates"] == 0
    assert summary["skipped_utterances"] == prepared["skipped"]
    records = read_metrics(tmp_path / "run")
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    before, after = (r["eval"]["dev"]["loss"] for r in records if "eval" in r)
    assert after < 0.8 * before
