import json

import numpy as np
import pytest

from experiments import self_training
from experiments.configs.self_training import get_config
from experiments.self_training import draw, gap_closed, quality, summarize, used
from fedasr.data.corpus import InMemoryCorpus
from fedasr.text import CharTokenizer
from fedasr.training.logging import to_json

TOKENIZER = CharTokenizer()


def result(dev, test, teachers=()):
    return {"wer": {"dev": dev, "test": test}, "teachers": list(teachers)}


def seed_results(labelled=40.0, **others):
    return {
        "start": result(50.0, 48.0),
        "labelled": result(45.0, labelled),
        "self": result(30.0, 30.0, [{"round": 0, "kept": 0.5, "wer": 4.0}]),
        "all": result(20.0, 20.0),
    } | others


def test_the_gap_is_from_the_better_of_what_a_tenth_gives():
    assert gap_closed(seed_results()) == pytest.approx(0.5)
    # The rounds did harm, by dev: then it is from where they began.
    assert gap_closed(seed_results(start=result(44.0, 60.0))) == pytest.approx(0.75)
    assert gap_closed(seed_results(all=result(50.0, 41.0))) is None
    summary = summarize({0: seed_results(), 1: seed_results(60.0)}, self_training.SYSTEMS)
    assert summary["gap_closed"]["values"] == [0.5, 0.75]
    assert summary["wer"]["labelled"]["test"]["mean"] == 50
    lines = list(self_training._lines(summary))
    assert "gap closed: 62.5 (17.7)%" in lines and "50% at 4.0%" in lines[-2]
    summary = summarize({0: seed_results()}, ["self"])
    assert "gap_closed" not in summary and set(summary["wer"]) == {"start", "self"}


def test_it_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    draw(summarize({0: seed_results()}, self_training.SYSTEMS), tmp_path / "plots" / "gap.png")
    assert (tmp_path / "plots" / "gap.png").stat().st_size > 1000


def test_quality_is_of_users_without_transcripts():
    said = {"a": ["one two", "two"], "b": ["one", "two two"], "c": ["six"]}
    examples = {
        user: [{"labels": TOKENIZER.encode(text)} for text in texts] for user, texts in said.items()
    }

    class Bench:
        data = type("Data", (), {"train": InMemoryCorpus(examples, ["labels"])})
        labelled = (0,)

    Bench.data.tokenizer = TOKENIZER
    labels = {(0, 0): TOKENIZER.encode("six"), (1, 1): TOKENIZER.encode("two ten")}
    assert quality(Bench, labels) == {"kept": 1 / 3, "wer": 50.0}
    assert quality(Bench, {(0, 0): np.int32([1])}) == {"kept": 0.0, "wer": 0.0}


def test_a_result_depends_on_what_it_uses():
    config = to_json(get_config().to_dict())
    other = json.loads(json.dumps(config))
    other["self_training"]["confidence"] = 0.1
    assert used(config, "self") != used(other, "self")
    assert used(config, "all") == used(other, "all")
    other["rounds"] += 1
    assert used(config, "all") != used(other, "all")
    assert used(config, "start") == used(other, "start")
    other["self_training"]["labelled"] = 0.2
    assert used(config, "start") != used(other, "start")
