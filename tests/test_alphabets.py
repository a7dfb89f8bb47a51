"""Alphabets of scripts and of the data, and subword tokenizers."""

import json
import random
import unicodedata

import numpy as np
import pytest

from fedasr.data.preparation.conversion import Skip, labels_of
from fedasr.errors import UserError
from fedasr.text import (
    SCRIPTS,
    CharTokenizer,
    SubwordTokenizer,
    alphabet_of,
    learned_vocabulary,
    normalise,
    read_subwords,
    script_alphabet,
    tokenizer_for,
)
from fedasr.training.metrics import word_errors

# ruff: noqa: RUF001 (letters of other scripts look like Latin ones)

# (script, language, a sentence as it is written, its words): vowel signs and marks are letters.
SENTENCES = [
    (
        "cyrillic",
        "ru",
        "Съешь ещё этих мягких булок, да выпей чаю!",
        "съешь ещё этих мягких булок да выпей чаю",
    ),
    ("greek", "el", "Ξεσκεπάζω την ψυχοφθόρα σκέψη.", "ξεσκεπάζω την ψυχοφθόρα σκέψη"),
    ("arabic", "ar", "مرحبا بكم، كيف الحال؟", "مرحبا بكم كيف الحال"),
    ("hebrew", "he", "שלום, מה שלומך?", "שלום מה שלומך"),
    ("devanagari", "hi", "नमस्ते, आप कैसे हैं? ज़रूर।", "नमस्ते आप कैसे हैं ज़रूर"),
    ("bengali", "bn", "আমি বাংলায় গান গাই।", "আমি বাংলায় গান গাই"),
    ("tamil", "ta", "வணக்கம், எப்படி இருக்கிறீர்கள்?", "வணக்கம் எப்படி இருக்கிறீர்கள்"),
    ("thai", "th", "สวัสดีครับ น้ำเย็น", "สวัสดีครับ น้ำเย็น"),
    ("hangul", "ko", "안녕하세요, 반갑습니다!", "안녕하세요 반갑습니다"),
    ("kana", "ja", "コーヒー、ありがとう。", "コーヒー ありがとう"),
    ("armenian", "hy", "Բարև ձեզ, ինչպե՞ս եք։", "բարև ձեզ ինչպես եք"),
    ("georgian", "ka", "გამარჯობა, როგორ ხარ?", "გამარჯობა როგორ ხარ"),
    ("ethiopic", "am", "ሰላም፣ እንዴት ነህ?", "ሰላም እንዴት ነህ"),
    ("telugu", "te", "నమస్కారం, ఎలా ఉన్నారు?", "నమస్కారం ఎలా ఉన్నారు"),
]
HAN = ("zh", "你好，世界！", "你好 世界")


@pytest.mark.parametrize(("script", "language", "text", "words"), SENTENCES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_scripts_by_name_and_from_data(script, language, text, words, form):
    words = unicodedata.normalize("NFC", words)
    named, found = script_alphabet(script), alphabet_of([text], language)
    assert len(set(named)) == len(named) and len(set(found)) == len(found)
    # Nothing but the letters and marks of the words, and the space.
    assert set(found) == set(words) | {" "}
    for characters in (named, found):
        written = normalise(unicodedata.normalize(form, text), language, characters)
        assert written == (words, ())
        tokenizer = CharTokenizer(characters)
        ids = tokenizer.encode(written.text, pad_space=True)
        assert ids.min() > 0 and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == words
        assert word_errors([words], [tokenizer.decode(ids)]).errors == 0


def test_han_has_the_alphabet_of_the_data():
    language, text, words = HAN
    characters = alphabet_of([text], language)
    assert characters == " " + "".join(sorted(set(words) - {" "}))
    assert normalise(text, language, characters) == (words, ())
    # What the data does not have is counted, not written as something else.
    assert normalise("你早", language, characters).losses == (("早", "letter of another script"),)


def test_hangul_has_few_tokens():
    assert len(script_alphabet("hangul")) < 80
    assert len(SCRIPTS) >= 10


def test_the_order_of_texts_changes_nothing():
    texts = ["Über den Wolken", "don't stop", "well-known", "ÀÉ", "zé zé"]
    whole = alphabet_of(texts)
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        assert alphabet_of(texts) == whole
    assert {"ü", "é", "'", "-", " "} <= set(whole) and "Ü" not in whole
    rare = alphabet_of(texts, min_count=3)
    assert "é" in rare and "à" not in rare and set(rare) < set(whole)


def test_what_is_no_alphabet_is_refused():
    with pytest.raises(UserError, match="no letters"):
        alphabet_of(["123", "?!"])
    with pytest.raises(UserError, match=r"from_data.*cyrillic"):
        script_alphabet("cyrilic")


def test_a_learned_vocabulary_is_said():
    assert learned_vocabulary({"options": {"characters": "ab "}}) == ""
    assert "alphabet" in learned_vocabulary({"options": {"characters": "ab ", "learned": True}})


# ------------------------------------------------------------------------------------- subwords

WORDS = (
    "turn on off the kitchen light lights call my sister play some music stop don't well-known "
    "please open close window windows garden brother mother water coffee morning evening tomorrow "
    "yesterday weather report louder quieter station television bedroom bathroom volume"
)
LINES = [
    " ".join(random.Random(i).choices(WORDS.split(), k=random.Random(i).randint(2, 7)))
    for i in range(300)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """SentencePiece (unigram and BPE, lower case and capitals) and two tokenizer.json."""
    spm = pytest.importorskip("sentencepiece")
    hf = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("subwords")
    made = {}
    for name, lines, options in (
        ("unigram", LINES, {"model_type": "unigram", "vocab_size": 60}),
        ("bpe", LINES, {"model_type": "bpe", "vocab_size": 60}),
        ("capitals", [line.upper() for line in LINES], {"model_type": "bpe", "vocab_size": 60}),
    ):
        (folder / f"{name}.txt").write_text("\n".join(lines))
        spm.SentencePieceTrainer.train(
            input=str(folder / f"{name}.txt"),
            model_prefix=str(folder / name),
            minloglevel=2,
            num_threads=1,
            **options,
        )
        made[name] = folder / f"{name}.model"
    byte = hf.Tokenizer(hf.models.BPE())
    byte.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
    byte.decoder = hf.decoders.ByteLevel()
    byte.train_from_iterator(
        LINES,
        hf.trainers.BpeTrainer(vocab_size=80, special_tokens=["<s>", "<pad>"], show_progress=False),
    )
    meta = hf.Tokenizer(hf.models.BPE(unk_token="<unk>"))
    meta.pre_tokenizer, meta.decoder = hf.pre_tokenizers.Metaspace(), hf.decoders.Metaspace()
    meta.train_from_iterator(
        LINES, hf.trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"], show_progress=False)
    )
    for name, tokenizer in (("bytes", byte), ("metaspace", meta)):
        made[name] = folder / f"{name}.json"
        tokenizer.save(str(made[name]))
    return made


KINDS = ["unigram", "bpe", "capitals", "bytes", "metaspace"]


@pytest.mark.parametrize("kind", KINDS)
def test_subwords_write_words_and_read_them(models, kind):
    tokenizer = read_subwords(models[kind])
    assert tokenizer.blank == 0 and tokenizer.vocab_size == len(tokenizer.characters) + 1
    for line in LINES[:50]:
        ids = tokenizer.encode(line)
        assert ids.dtype == np.int32 and 0 < ids.min() and ids.max() < tokenizer.vocab_size
        assert len(ids) < len(line)  # pieces are longer than characters
        assert tokenizer.decode(ids) == line
        # Blanks, of CTC's frames or of padding, change nothing.
        assert tokenizer.decode([0, *ids, 0, 0]) == line
    rate = word_errors([LINES[0]], [tokenizer.decode(tokenizer.encode(LINES[0])[:-1])])
    assert 0 < rate.errors <= 2
    for wrong in ([tokenizer.vocab_size], [-1]):
        with pytest.raises(ValueError):
            tokenizer.decode(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_signs_of_the_model_are_never_written(models, kind):
    tokenizer = read_subwords(models[kind])
    every = tokenizer.decode(range(tokenizer.vocab_size))
    assert not set(every) - set("abcdefghijklmnopqrstuvwxyz'- ")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_in_subwords(models, kind):
    tokenizer = read_subwords(models[kind])
    labels = labels_of("Turn on,the KITCHEN light!", "en", tokenizer, True)
    assert tokenizer.decode(labels) == "turn on the kitchen light"
    # A letter that no piece holds, a digit: counted.
    for text in ("turn on the xylophone", "turn 7 on"):
        with pytest.raises(Skip) as skip:
            labels_of(text, "en", tokenizer, True)
        assert skip.value.args[0] in ("unknown_characters", "unwritable_text")


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_corpus_holds_its_subwords(models, kind):
    tokenizer = read_subwords(models[kind])
    stored = {"characters": tokenizer.characters, "subwords": tokenizer.options}
    metadata = json.loads(json.dumps({"options": stored}))
    again = tokenizer_for(metadata)
    assert isinstance(again, SubwordTokenizer) and again.characters == tokenizer.characters
    np.testing.assert_array_equal(again.encode(LINES[0]), tokenizer.encode(LINES[0]))
    assert "subword" in learned_vocabulary(metadata)


def test_other_files_are_refused(tmp_path):
    pytest.importorskip("sentencepiece"), pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match="cannot be read"):
        read_subwords(tmp_path / "none")
    for content, message in ((b"no model", "SentencePiece"), (b'{"a": 1}', "tokenizer.json")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_subwords(tmp_path / "file")


# ------------------------------------------------------------------------------ error rates

REFERENCES = [
    "Wait,what?No!Yes",
    "The U.S. army--they said--left.",
    "\u2018Don\u2019t stop,\u2019 she cried; well-known, isn\u2019t it?",
    "caf\u00c3\u00a9 au lait",
    "He left.She stayed",
]
HYPOTHESES = [
    "wait what no yes please",
    "the us army they set left",
    "don't stop she tried well known isn't it",
    "cafe o lait",
    "he left she",
]


def test_word_error_rates_agree_with_jiwer(tmp_path):
    """Of two files, normalised alike; jiwer counts words by its own code."""
    jiwer = pytest.importorskip("jiwer")
    for name, lines in (("references.txt", REFERENCES), ("hypotheses.txt", HYPOTHESES)):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    files = [(tmp_path / f"{x}.txt").read_text("utf-8") for x in ("references", "hypotheses")]
    references, hypotheses = ([normalise(x).text for x in file.split("\n")] for file in files)
    ours = word_errors(references, hypotheses)
    assert ours.percent == pytest.approx(100 * jiwer.wer(references, hypotheses), abs=1e-9)
    # By hand: please; said/set; cried/tried, well-known/well, known; au/o; stayed.
    assert (ours.errors, ours.total) == (1 + 1 + 3 + 1 + 1, 4 + 6 + 7 + 3 + 4)
