"""What labels are written in, and what a summary says of transcripts that cannot be."""

import json

import numpy as np
import pytest

from fedasr.data.preparation.prepare import prepare
from fedasr.data.preparation.summary import SKIPPED_FILE, describe_unknown
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError
from fedasr.text import FROM_DATA, alphabet_of, learned_vocabulary, tokenizer_for
from fedasr.training.builders.corpora import fitting_tokenizer
from fedasr.training.config import Config, Model
from fedasr.training.describe import not_covered


def sound():
    return np.random.default_rng(0).normal(size=16_000).astype(np.float32) * 0.1, 16_000


def utterances(texts):
    return [Utterance(f"{i:02d}", "ann", text, "train", sound) for i, text in enumerate(texts)]


def stored(folder):
    tokenizer = tokenizer_for(read_metadata(folder))
    corpus = open_corpus(folder, "train")
    return [tokenizer.decode(x["labels"]) for x in corpus.get(0, range(int(corpus.sizes[0])))]


def test_a_summary_shows_what_cannot_be_written(tmp_path):
    texts = ["yes", "room 7 & 77", "don?t", "\u0434\u0430", "caf\ufffd", "no 7"]
    summary = prepare(utterances(texts), tmp_path, name="x")
    assert summary["skipped"] == {"unknown_characters": 5}
    found = {shown: (reason, count) for shown, reason, count in summary["unknown_characters"]}
    assert found["7"] == ("digit", 4) and found["&"][1] == found["?"][1] == 1
    assert found["\u0434[U+0434]"] == ("letter of another script", 1)
    assert "U+FFFD" in str(found)
    line = describe_unknown(summary["unknown_characters"])
    for part in ("7 4x", "write numbers as words", "--alphabet=from_data", "\u0434[U+0434] 1x"):
        assert part in line
    details = [json.loads(x)["detail"] for x in (tmp_path / SKIPPED_FILE).open(encoding="utf-8")]
    assert "7 (digit) x3" in details[0] and "room 7 & 77" in details[0]


def test_nothing_stored_says_why(tmp_path):
    with pytest.raises(UserError, match=r"2 unknown_characters: 7 2x \(digit: write numbers"):
        prepare(utterances(["7", "7"]), tmp_path, name="x")


def test_corpora_in_other_alphabets(tmp_path):
    texts = ["\u041f\u0440\u0438\u0432\u0435\u0442,\u043c\u0438\u0440!", "\u0434\u0430"]
    words = ["\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "\u0434\u0430"]
    found = alphabet_of(texts, "ru")
    for name, options in (
        ("script", {"alphabet": "cyrillic"}),
        ("data", {"alphabet": found, "learned": True}),
    ):
        summary = prepare(utterances(texts), tmp_path / name, name="x", language="ru", **options)
        assert summary["skipped"] == {} and stored(tmp_path / name) == words
    learned = learned_vocabulary(read_metadata(tmp_path / "data"))
    assert learned and not learned_vocabulary(read_metadata(tmp_path / "script"))
    # The report's list of what no epsilon covers has it.
    config = Config()
    before = not_covered(config, True)
    assert set(not_covered(config.with_data(vocabulary=learned), True)) - set(before) == {learned}
    # A model for other characters is refused in one line that says what to set.
    model = Model("transformer", {"vocab": 30})
    with pytest.raises(UserError, match=rf"model\.options\.vocab={len(found) + 1}"):
        fitting_tokenizer(Config(model=model), read_metadata(tmp_path / "data"))
    with pytest.raises(UserError, match="alphabet_of"):
        prepare(utterances(texts), tmp_path / "x", name="x", alphabet=FROM_DATA)
    with pytest.raises(UserError, match="cyrilic"):
        prepare(utterances(texts), tmp_path / "x", name="x", alphabet="cyrilic")


def test_a_corpus_in_subwords(tmp_path):
    hf = pytest.importorskip("tokenizers")
    model = hf.Tokenizer(hf.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer, model.decoder = hf.pre_tokenizers.Metaspace(), hf.decoders.Metaspace()
    texts = ["Turn on,the light", "Turn off the light", "stop"]
    trainer = hf.trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>"], show_progress=False)
    model.train_from_iterator([x.lower().replace(",", " ") for x in texts], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    options = {"name": "x", "tokenizer": tmp_path / "tokenizer.json"}
    summary = prepare(utterances([*texts, "quiz"]), tmp_path / "out", **options)
    assert summary["skipped"] == {"unknown_characters": 1}
    assert stored(tmp_path / "out") == ["turn on the light", "turn off the light", "stop"]
    metadata = read_metadata(tmp_path / "out")
    vocab = tokenizer_for(metadata).vocab_size
    config = Config(model=Model("transformer", {"vocab": vocab}))
    assert fitting_tokenizer(config, metadata).decode([0]) == ""
    assert "subword" in learned_vocabulary(metadata)
    with pytest.raises(UserError, match="leave the alphabet"):
        prepare(utterances(texts), tmp_path / "x", alphabet="greek", **options)
