"""The rules by which the programs of arXiv 2310.00098 write transcripts."""

import json

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.text import CharTokenizer, normalise, published_text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Hello, world!", "hello world"),
        ("and/or", "andor"),  # what punctuation separates becomes one word
        ("wait...what", "waitwhat"),
        ("one\u2014two", "onetwo"),
        ("well-known", "well-known"),
        ("- so - it goes -", "so it goes"),
        ("rock -n- roll", "rock n roll"),
        ("In 1999 & later", "in later"),
        ("caf\u00e9 Stra\u00dfe \u0153uvre", "cafe strasse oeuvre"),
        ("\u0141\u00f3d\u017a", "lodz"),
        ("\u041c\u043e\u0441\u043a\u0432\u0430", "moskva"),  # any script
        ("don\u2019t", "don't"),
        ("\u2019tis", "'tis"),
        ("the end.\u2019", "the end"),
        ("the dogs\u2019.", "the dogs"),
        ("it's 'quoted'", "it's 'quoted'"),  # as it is
        ("123 !", ""),
    ],
)
def test_by_hand(text, written):
    assert published_text(text) == written


def test_where_it_differs_from_words_as_they_are_said():
    assert normalise("and/or").text == "and or"
    assert normalise("In 1999 & later").losses


def utterance(name, text):
    rng = np.random.default_rng(0)
    audio = 0.1 * rng.standard_normal(16_000).astype(np.float32), 16_000
    return Utterance(name, "u", text, "train", lambda: audio)


def test_an_utterance_stays_whatever_its_label_lacks(tmp_path):
    texts = ["in 1999", "and/or", "12"]
    given = [utterance(str(i), text) for i, text in enumerate(texts)]
    summary = prepare(given, tmp_path / "out", name="x", rules="published", pad_space=False)
    assert summary["skipped"] == {"empty_text": 1}
    labels = [x["labels"] for x in open_corpus(tmp_path / "out", "train").get(0, range(2))]
    assert [CharTokenizer().decode(x) for x in labels] == ["in", "andor"]
    # A corpus made without rules is known by what releases before them wrote.
    assert read_metadata(tmp_path / "out")["options"]["rules"] == "published"
    prepare(given[1:2], tmp_path / "words", name="x")
    assert "rules" not in json.loads(json.dumps(read_metadata(tmp_path / "words")["options"]))
    for wrong in ({"rules": "other"}, {"rules": "published", "keep_letters": True}):
        with pytest.raises(UserError, match="rules"):
            prepare(given, tmp_path / "no", name="x", **wrong)
