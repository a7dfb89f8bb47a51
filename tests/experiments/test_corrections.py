import pytest

from experiments.corrections import draw, measure, missed_words, summarize
from fedasr.errors import UserError

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
