"""What `fedasr train --dry_run` tells people."""

import ast

import pytest

from fedasr.cli import train
from fedasr.training import loop
from fedasr.training.config import default_config
from fedasr.training.logging import to_json


def planned(**changes):
    config = default_config()
    config.model.options.update(dim=16, blocks=1, heads=2, mlp=16)
    for name, value in changes.items():
        *parts, leaf = name.split("__")
        section = config
        for part in parts:
            section = section[part]
        section[leaf] = value
    return list(train._planned(loop.dry_run(to_json(config.to_dict()))))


def test_it_is_lines_of_words():
    lines = planned(rounds=7, privacy__sigma=4.5e-4, seed_training__steps=3)
    text = "\n".join(lines)
    assert "7 rounds with 8 users expected in each" in text
    assert "a seed first: 3 steps on 'seed'" in text
    assert "privacy as deployed" in text and "epsilon" in text
    for line in lines:
        assert not {"{", "}"} & set(line), line
    settings = lines[lines.index("settings other than the defaults (--json prints all):") + 1 :]
    found = dict(line.strip().split("=", 1) for line in settings)
    assert found["rounds"] == "7" and ast.literal_eval(found["privacy.sigma"]) == 4.5e-4
    assert found["model.options.dim"] == "16"
    assert "cohort" not in found and "privacy.clip_norm" not in found


@pytest.mark.parametrize(
    ("changes", "words", "missing"),
    [
        ({"privacy__enabled": False}, "privacy: none", "epsilon compares"),
        ({"algorithm": "central", "central__steps": 9}, "9 steps of central training", "rounds"),
        ({"privacy__sigma": 0.0}, "infinite", "privacy: none"),
    ],
)
def test_what_there_is_not_is_not_told(changes, words, missing):
    text = "\n".join(planned(**changes))
    assert words in text and missing not in text
