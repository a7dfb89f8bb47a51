import types

import numpy as np
import pytest

from experiments import corrections
from experiments.configs.corrections import get_config
from experiments.corrections import draw, measure, missed_words, summarize
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated import simulation
from fedasr.feedback import corrections as lib
from fedasr.feedback import histograms, weighting
from fedasr.training.logging import to_json

SAID = ["buy two lemons today", "sell six sandals again", "find ten kettles please"]
HEARD = ["buy two lemmons today", "sell sandals again", "find ten lemons please"]


def test_measures_by_hand():
    found = measure(SAID, HEARD)
    # Fresh: the first two sentences (2 errors of 8 words); rare: lemons, in the first alone.
    assert found == {"fresh": 25.0, "rare": 25.0, "general": 25.0, "rare_missed": 100.0}
    assert missed_words(SAID, HEARD, {"sandals", "kettles", "lemons"}) == pytest.approx(200 / 3)
    assert missed_words(SAID, SAID, {"sandals"}) == 0
    assert missed_words(SAID, HEARD, {"nothing"}) == 0


def rates(fresh, general, missed):
    return {"fresh": fresh, "rare": 2 * fresh, "general": general, "rare_missed": missed}


def result(*args):
    return {"wer": {"test": rates(*args)}, "averaged": {"test": rates(*args)}}


def seed_results(shift):
    planted = {
        "right": {"edits": 10, "kept": 9},
        "typo": {"edits": 4, "kept": 0},
        "wrong word": {"edits": 4, "kept": 2},
        "rewrite": {"edits": 2, "kept": 0},
    }
    return {
        "stale": result(40, 5, 100),
        "uniform": result(30, 6, 80 + shift),
        "words": result(20, 4 + shift, 60),
        "filters": {"planted": planted},
    }


def test_the_summary_is_by_seed(tmp_path):
    summary = summarize({0: seed_results(0), 1: seed_results(2)}, ["uniform", "words"])
    assert summary["seeds"] == [0, 1]
    assert set(summary["test"]) == {"stale", "uniform", "uniform+", "words", "words+"}
    assert summary["filters"]["right_kept"]["mean"] == pytest.approx(0.9)
    assert summary["filters"]["wrong_removed"]["mean"] == pytest.approx(0.8)
    assert summary["fresh_relative_reduction"]["words"]["values"] == [50, 50]
    worse = summary["general_points_worse"]["words"]
    assert (worse["mean"], worse["values"]) == (0, [-1, 1])
    assert worse["std"] == pytest.approx(2**0.5)
    better = summary["better_than_uniform"]
    assert better["words rare_missed"]["values"] == [20, 22]
    assert better["words+ rare"]["values"] == [20, 20]
    draw(summary, tmp_path / "plots" / "bars.png")
    assert (tmp_path / "plots" / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw({"test": {}}, tmp_path / "bars.png")


class Stop(Exception):
    """Enough has been seen."""


@pytest.fixture
def released(monkeypatch):
    """released(system, noise, seed): every histogram that a run publishes, and its mechanism."""
    seen = []
    count = histograms.client_histogram

    def recorded(keys, **options):
        seen.append(options)
        return count(keys, **options)

    def stop(corpus, mechanism, *args, **options):
        raise Stop(mechanism)

    texts = {0: ["one two"], 1: ["two three"], 2: ["three"]}
    corpus = InMemoryCorpus(
        {f"u{i}": [{"features": np.zeros((9 + i, 2), np.float32)}] for i in texts}
    )
    feedback = [types.SimpleNamespace(user=i, index=0, edited=t[0]) for i, t in texts.items()]
    monkeypatch.setattr(histograms, "client_histogram", recorded)
    monkeypatch.setattr(simulation, "Simulation", stop)
    monkeypatch.setattr(lib, "transcribe", lambda *args: ([], []))
    monkeypatch.setattr(lib, "simulate_edits", lambda *args: feedback)
    pairs = [{f"{i}"} for i in range(3)]
    monkeypatch.setattr(lib, "pairs_of_users", lambda *args: pairs)
    review = types.SimpleNamespace(label="one two")
    monkeypatch.setattr(lib, "review", lambda *args: review)
    monkeypatch.setattr(lib, "corrected_corpus", lambda *args: corpus)
    words = [{"one", "two"}, {"two"}, {"three"}]
    monkeypatch.setattr(weighting, "words_of_users", lambda *args: words)
    monkeypatch.setattr(corrections, "server_words", lambda bench: {})

    def run(system, noise, seed=0):
        config = get_config()
        config.corrections.histogram_noise = noise
        config.cohort = 2
        tokenizer = types.SimpleNamespace(characters="abc")
        recogniser = types.SimpleNamespace(loss=lambda *args: (0.0, {}), evaluate=None)
        bench = types.SimpleNamespace(
            config=to_json(config.to_dict()),
            corpora={"train": corpus, "seed": corpus, "dev": corpus},
            tokenizer=tokenizer,
            recogniser=recogniser,
            evaluator=None,
            pad_space=False,
            bucket={"features": 9, "labels": 4},
        )
        seen.clear()
        with pytest.raises(Stop) as stopped:
            corrections.train(bench, system, {}, seed, print)
        return list(seen), stopped.value.args[0]

    return run


def test_what_a_private_run_publishes_has_the_noise_that_its_epsilon_counts(released):
    seen, mechanism = released("private", 3.0)
    assert len(seen) == 2 and mechanism.noise_multiplier > 0
    assert (
        sorted(one["noise_multiplier"] for one in seen) == sorted(mechanism.released) == [3.0] * 2
    )
    # Noise that two histograms share would not be there in their difference.
    seeds = [one["seed"] for one in seen]
    for other in (released("private", 3.0, 1), released("private", 4.0), released("words", 0.0)):
        seeds += [one["seed"] for one in other[0]]
    assert len(set(seeds)) == len(seeds) == 8
    exact, plain = released("words", 3.0)
    assert {one["noise_multiplier"] for one in exact} == {0.0} and plain.released == ()
