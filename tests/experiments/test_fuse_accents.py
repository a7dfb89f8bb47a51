import collections
import dataclasses
from pathlib import Path

import pytest

from experiments.fuse_accents import Bench, by_group, draw, lines, own_seed, summarize
from fedasr.data.synthetic import SyntheticConfig
from fedasr.data.synthetic.voices import TARGET_ACCENTS
from fedasr.data.utterances import Utterance


def test_users_are_divided_by_accent():
    config = SyntheticConfig()
    users = ["seed-000", "target-000", "target-001", "target-003", "target-008"]
    spoken = [
        Utterance(f"{user}-{i}", user, "one", "seed" if "seed" in user else "train", None)
        for user in users
        for i in range(2)
    ]
    # Target users have the eight accents in turn.
    groups = {"north": ["en-gb-scotland"], "west": ["en-029"]}
    found = list(by_group(iter(spoken), config, groups, 0.0))
    splits = {utterance.user: utterance.split for utterance in found}
    assert splits == {
        "seed-000": "seed",
        "target-000": "train_north",
        "target-001": "train_west",
        "target-008": "train_north",
    }
    kept = [utterance for utterance in spoken if utterance.user in splits]
    assert [dataclasses.replace(u, split="") for u in found] == [
        dataclasses.replace(u, split="") for u in kept
    ]


def test_some_training_users_go_to_the_seed_with_all_they_said():
    config = SyntheticConfig(train_users=200)
    spoken = [
        Utterance(f"{i}-{split}-{k}", f"target-{i:03d}", "one", split, None)
        for i in range(200)
        for split in ("train" if i % 4 else "test",)
        for k in range(2)
    ]
    groups = {"all": list(dict.fromkeys(TARGET_ACCENTS))}
    found = list(by_group(iter(spoken), config, groups, 0.3))
    assert len(found) == len(spoken)
    splits = {u.user: {v.split for v in found if v.user == u.user} for u in found}
    assert all(len(names) == 1 for names in splits.values())
    counts = collections.Counter(name for names in splits.values() for name in names)
    assert counts["test_all"] == 50  # testers stay
    # Three standard deviations of 150 draws.
    assert abs(counts["seed"] - 45) < 3 * (150 * 0.3 * 0.7) ** 0.5
    assert counts["seed"] + counts["train_all"] == 150


def rates(a, b):
    return {"a": a, "b": b, "all": (a + b) / 2}


def result(shift):
    wer = {"seed": rates(90, 90), "a": rates(10, 40), "b": rates(50, 20), "union": rates(9, 9)}
    wer |= {"average": rates(30, 30), "m2n2": rates(12 + shift, 21)}
    spent = {"epsilon": 5.0, "delta": 1e-9, "extrapolations": []}
    return {"wer": wer, "privacy": {"a": spent}, "search": {}}


def test_the_summary_is_by_seed(tmp_path):
    bench = Bench({}, Path("data"), ("a", "b"))
    summary = summarize({"private": {0: result(0), 1: result(2)}}, bench)
    found = summary["private"]
    assert found["wer"]["m2n2"]["a"]["values"] == [12, 14]
    assert found["better_than_average"] == {
        "m2n2": {"mean": 13.0, "std": pytest.approx(2**-0.5), "values": [13.5, 12.5]}
    }
    worse = found["worse_than_specialist"]["m2n2"]
    assert (worse["a"]["values"], worse["b"]["values"]) == ([2, 4], [1, 1])
    text = "\n".join(lines(summary))
    assert "m2n2: a 13.0 (1.4), b 21.0 (0.0), all 17.0 (0.7)" in text
    assert "13.0 (0.7) points better than the average" in text
    draw(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_two_runs_have_one_seed():
    names = ["/train_a", "/train_b", "/train_a+train_b", "m2n2/train_a", "m2n2/train_b"]
    seeds = {own_seed(seed, name) for seed in range(3) for name in names}
    assert len(seeds) == 15 and all(0 <= seed < 2**31 for seed in seeds)
