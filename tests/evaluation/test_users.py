"""Errors by user and group against numpy by hand and jiwer; coverage of the intervals."""

import json

import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.evaluation import bootstrap
from fedasr.evaluation.alignment import align, characters_of, words_of
from fedasr.evaluation.confusions import both
from fedasr.evaluation.hypotheses import Hypothesis, read_hypotheses, write_hypotheses
from fedasr.evaluation.users import (
    UNKNOWN,
    UserErrors,
    by_user,
    columns_of,
    groups,
    minutes_label,
    statistics,
)

WORDS = "one two three four five six seven eight nine zero".split()


def made(users=12, each=5, seed=0):
    """Random sentences, and what a bad recogniser makes of them."""
    rng = np.random.default_rng(seed)
    found = []
    for user in range(users):
        for i in range(each):
            said = list(rng.choice(WORDS, rng.integers(1, 7)))
            heard = [w if rng.random() > 0.3 else str(rng.choice(WORDS)) for w in said]
            heard = [w for w in heard if rng.random() > 0.1]
            if rng.random() < 0.3:
                heard.insert(int(rng.integers(len(heard) + 1)), "uh")
            metadata = {"gender": "fm"[user % 2], "take": str(i)}
            if user % 5 == 0:
                metadata.pop("gender")
            name = f"user {user:02}"
            texts = " ".join(said), " ".join(heard)
            found.append(Hypothesis("test", name, i, *texts, metadata=metadata))
    return found


def test_alignments_are_those_of_jiwer():
    jiwer = pytest.importorskip("jiwer", reason="jiwer is the oracle of alignments")
    names = {"equal": "=", "substitute": "S", "delete": "D", "insert": "I"}
    seen = set()
    for one in made(40):
        for output, tokens in (
            (jiwer.process_words(one.reference, one.hypothesis or " "), words_of),
            (jiwer.process_characters(one.reference, one.hypothesis or " "), characters_of),
        ):
            ours = align(tokens(one.reference), tokens(one.hypothesis))
            reference, hypothesis = output.references[0], output.hypotheses[0]
            theirs = []
            for chunk in output.alignments[0]:
                said = reference[chunk.ref_start_idx : chunk.ref_end_idx]
                heard = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
                said = said or [""] * len(heard)
                heard = heard or [""] * len(said)
                theirs += [(names[chunk.type], *pair) for pair in zip(said, heard, strict=True)]
            assert [tuple(pair) for pair in ours] == theirs
            seen |= {pair.kind for pair in ours}
    assert seen == set("=SDI")


def distance(a, b):
    """Edit distance by the textbook's table."""
    row = np.arange(len(b) + 1)
    for x in a:
        previous, row = row, np.concatenate([[row[0] + 1], row[1:]])
        for j, y in enumerate(b, 1):
            row[j] = min(previous[j - 1] + (x != y), previous[j] + 1, row[j - 1] + 1)
    return int(row[-1])


def test_figures_by_user_are_those_by_hand():
    found = made()
    users = by_user(found, {"user 03": 2.5})
    wers = []
    for user in users:
        own = [one for one in found if one.user == user.user]
        errors = sum(distance(o.reference.split(), o.hypothesis.split()) for o in own)
        chars = sum(distance(o.reference, o.hypothesis) for o in own)
        assert (user.word_errors, user.char_errors) == (errors, chars)
        assert user.words == sum(len(o.reference.split()) for o in own)
        assert user.characters == sum(len(o.reference) for o in own)
        wers.append(100 * errors / user.words)
    assert [user.training_minutes for user in users] == [2.5 * (i == 3) for i in range(12)]
    stats = statistics(users)
    wers = np.array(wers)
    assert stats["mean"] == pytest.approx(wers.mean())
    assert stats["sd"] == pytest.approx(np.sqrt(((wers - wers.mean()) ** 2).sum() / 11))
    for name, level in (("p10", 10), ("p50", 50), ("p90", 90)):
        assert stats[name] == pytest.approx(np.percentile(wers, level))
    assert stats["worst_decile"] == pytest.approx(np.sort(wers)[-2:].mean())  # 2 of 12
    total = 100 * sum(u.word_errors for u in users) / sum(u.words for u in users)
    assert stats["all"] == pytest.approx(total)
    for name, (low, high) in stats["intervals"].items():
        assert low < stats[name] < high or name == "worst_decile"
    assert statistics(users[:1])["sd"] != statistics(users[:1])["sd"]
    assert statistics([])["users"] == 0


def test_groups_are_those_who_say_the_same_everywhere():
    users = by_user(made(), {"user 03": 2.5})
    columns = columns_of(users)
    assert set(columns) == {"gender", "training data", "seen in training"}  # "take" is no user's
    assert columns["gender"][:3] == [UNKNOWN, "m", "f"]
    found = groups(users, columns["gender"])
    by_hand = {
        value: np.mean([u.wer for u, v in zip(users, columns["gender"], strict=True) if v == value])
        for value in ("f", "m", UNKNOWN)
    }
    assert {k: v["rate"] for k, v in found["groups"].items()} == pytest.approx(by_hand)
    assert found["gap"] == pytest.approx(abs(by_hand["f"] - by_hand["m"]))  # not who says nothing
    assert groups(users, columns["seen in training"])["gap"] is None  # one alone has seen it
    labels = [minutes_label(x) for x in (0, 0.2, 1, 1.1, 30, 1e3)]
    assert labels == [
        "none", "up to 1 min", "up to 1 min", "1 to 3 min", "10 to 30 min", "over 100 min",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [10, 60])
def test_intervals_cover_the_truth(count):
    """Users of unequal rates and sizes, again and again."""
    rng = np.random.default_rng(5)
    trials, covered, means = 800, 0, 0
    sizes = rng.integers(20, 60, (trials, count))
    rates = rng.beta(4, 8, (trials, count))
    errors = rng.binomial(sizes, rates)
    counts = bootstrap.weights([count])
    truth = 100 * 4 / 12  # sizes and rates are independent: also that of all words
    for words, wrong in zip(sizes, errors, strict=True):
        low, high = bootstrap.interval(bootstrap.ratio(wrong, words, counts), count)
        covered += low <= truth <= high
        low, high = bootstrap.interval(counts @ (100 * wrong / words) / count, count)
        means += low <= truth <= high
    assert 0.93 <= covered / trials <= 0.97, covered / trials
    assert 0.93 <= means / trials <= 0.97, means / trials


def test_what_varies_is_users_and_not_their_words():
    """Half of the users are never understood, half always: a thousand words of each say no more."""
    users = [UserErrors(f"{i:02}", 100, 1000, 1, 1000 * (i % 2)) for i in range(16)]
    found = statistics(users)
    for name in ("all", "mean"):
        low, high = found["intervals"][name]
        assert found[name] == 50 and low < 28 and high > 72, name
    # Of 8 in each group, 4 and 6: +-1.05 x 2.36 standard errors of 19 and 16 points.
    values = ["a"] * 8 + ["b"] * 8
    users[8].word_errors = users[10].word_errors = 1000
    found = groups(users, values)
    low, high = found["groups"]["a"]["interval"]
    assert low < 20 and high > 80
    low, high = found["gap_interval"]
    assert (found["gap"], found["worst"]) == (25, "b") and low < -20 and high > 65


def test_draws_are_of_users_within_their_strata():
    counts = bootstrap.weights([3, 5], 50, seed=1)
    assert (counts[:, :3].sum(1) == 3).all() and (counts[:, 3:].sum(1) == 5).all()
    assert not (counts == bootstrap.weights([3, 5], 50, seed=2)).all()
    assert np.isnan(bootstrap.interval(np.array([1.0, 2.0]), 7)).all()
    assert np.isfinite(bootstrap.interval(np.array([1.0, 2.0, np.nan]), 8)).all()


def test_confusions_count_edits():
    heard = {"one two one": "one too one big", "one six": "six", "two": "too"}
    found = [Hypothesis("test", "a", i, *texts) for i, texts in enumerate(heard.items())]
    words = both(found)["words"]
    assert words == [
        {"reference": "two", "hypothesis": "too", "count": 2, "of": 2},
        {"reference": "", "hypothesis": "big", "count": 1, "of": None},
        {"reference": "one", "hypothesis": "", "count": 1, "of": 3},
    ]
    assert {"reference": "w", "hypothesis": "o", "count": 2, "of": 2} in both(found)["characters"]


def test_the_file_comes_back(tmp_path):
    found = [*made(3), Hypothesis("dev", "ü\udc80", 7, "", "x", 12, "id", 1.5, {"age": "teens"})]
    write_hypotheses(tmp_path / "hypotheses.jsonl", found)
    read = read_hypotheses(tmp_path)
    assert read == found
    assert [one.split for one in read_hypotheses(tmp_path, ["dev"])] == ["dev"]
    row = json.loads((tmp_path / "hypotheses.jsonl").read_bytes().splitlines()[0])
    assert row["words"]["errors"] == sum(kind != "=" for kind, *_ in row["alignment"])
    for text, said in (("{}", "line 1"), ("[1]", "line 1"), ('{"user": 1}', "line 1")):
        (tmp_path / "hypotheses.jsonl").write_text(text)
        with pytest.raises(UserError, match=said):
            read_hypotheses(tmp_path)
    with pytest.raises(UserError, match="fedasr evaluate"):
        read_hypotheses(tmp_path / "no")
    with pytest.raises(UserError, match="cannot be written"):
        write_hypotheses(tmp_path / "no" / "file", [])


def test_a_user_without_words():
    user = UserErrors("a", 1, 0, 0, 2, 5)
    assert (user.wer, user.cer) == (200.0, 500.0)
