"""Decoders by name, and what they know of a language."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.decoding.beam import BeamConfig
from fedasr.decoding.language import Knowledge, read_words, spellings
from fedasr.decoding.ngram import estimate
from fedasr.decoding.registry import DECODERS, make_decoder
from fedasr.errors import UserError
from fedasr.kernels.ctc import greedy_decode
from fedasr.text import CharTokenizer, PhonemeTokenizer

TOKENIZER = CharTokenizer("abcde ")
WORDS = frozenset(["ab", "abc", "ba", "cad", "dee"])
# Of these words "cad" never follows "ab": the model alone can tell.
MODEL = estimate(["ab ba", "ab dee", "ba cad", "cad ba", "ab ba"], 2, WORDS)


def spelled(text, sure=0.9, tokenizer=TOKENIZER):
    """Log probabilities [frames, vocab] that nearly spell a text, a blank after each letter."""
    size = tokenizer.vocab_size
    rows = []
    for token in tokenizer.encode(text):
        for k in (token, 0):
            row = np.full(size, (1 - sure) / (size - 1))
            row[k] = sure
            rows.append(row)
    return np.log(np.asarray(rows).reshape(-1, size))


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=12, max_size=12), st.integers(0, 12))
def test_greedy_is_the_devices_greedy(path, frames):
    log_probs = np.full((12, 7), -5.0, np.float32)
    log_probs[np.arange(12), path] = -0.1
    tokens, counts = greedy_decode(log_probs[None], np.int32([frames]))
    expected = TOKENIZER.decode(np.asarray(tokens)[0, : int(counts[0])])
    assert make_decoder("greedy", TOKENIZER)(log_probs[:frames]) == expected


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_writes_what_is_clearly_said(name):
    knowledge = None if name == "greedy" else Knowledge(MODEL, WORDS)
    decode = make_decoder(name, TOKENIZER, knowledge)
    for text in ("ab ba", "cad", "dee ab abc"):
        assert decode(spelled(text, 0.99)) == text
    assert decode(np.zeros((0, TOKENIZER.vocab_size), np.float32)) == ""


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25), st.booleans(), st.integers(1, 16))
def test_a_closed_lexicon_writes_no_other_word(seed, frames, with_model, beam):
    """Whatever the scores are, and however narrow the search is."""
    logits = 3 * np.random.default_rng(seed).normal(size=(frames, TOKENIZER.vocab_size))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    knowledge = Knowledge(MODEL if with_model else None, WORDS, BeamConfig(beam=beam))
    assert set(make_decoder("lexicon", TOKENIZER, knowledge)(log_probs).split()) <= WORDS


def test_a_lexicon_corrects_a_spelling_and_a_free_search_may_keep_it():
    log_probs = spelled("ab cae", 0.8)
    free = Knowledge(None, WORDS, BeamConfig(unknown_penalty=0.0))
    assert make_decoder("greedy", TOKENIZER)(log_probs) == "ab cae"
    assert make_decoder("beam", TOKENIZER, free)(log_probs) == "ab cae"
    assert make_decoder("lexicon", TOKENIZER, free)(log_probs) == "ab cad"


def test_a_language_model_chooses_between_what_sounds_alike():
    """Two words with the same scores: what follows "ab" in the transcripts wins, or the bonus."""
    ids = {c: int(TOKENIZER.encode(c)[0]) for c in "abcde "}
    log_probs = spelled("ab ", 0.9)
    rows = []
    for first, second in zip("cad", "dee", strict=True):
        row = np.full(TOKENIZER.vocab_size, 0.01)
        row[ids[first]] = row[ids[second]] = 0.4
        rows += [np.log(row), spelled("a")[1]]
    log_probs = np.concatenate([log_probs, rows])

    def text(weight):
        knowledge = Knowledge(MODEL, WORDS, BeamConfig(lm_weight=weight))
        return make_decoder("lexicon", TOKENIZER, knowledge)(log_probs)

    assert text(2.0) == "ab dee"
    seen_more = estimate(["ab cad"] * 5, 2, WORDS)
    knowledge = Knowledge(seen_more, WORDS, BeamConfig(lm_weight=2.0))
    assert make_decoder("lexicon", TOKENIZER, knowledge)(log_probs) == "ab cad"


def test_letters_and_marks_of_other_scripts():
    """Words are spelled as labels are, decomposed where the alphabet is, and come out composed."""
    tokenizer = CharTokenizer("e\u0301nt ")
    word = "\u00e9t\u00e9"
    assert spellings([word, "x"], tokenizer) == {word: [("e", "\u0301", "t", "e", "\u0301")]}
    log_probs = spelled(word, 0.95, tokenizer)
    for name in DECODERS:
        knowledge = None if name == "greedy" else Knowledge(lexicon=frozenset([word]))
        assert make_decoder(name, tokenizer, knowledge)(log_probs) == word
    free = Knowledge(lexicon=frozenset(["nt"]), beam=BeamConfig(unknown_penalty=0.1))
    assert make_decoder("beam", tokenizer, free)(log_probs) == word


def test_mistakes():
    for name in ("beam", "lexicon"):
        with pytest.raises(UserError, match="choose the decoder 'greedy'"):
            make_decoder(name, PhonemeTokenizer(), Knowledge(lexicon=WORDS))
        with pytest.raises(UserError, match="choose the decoder 'greedy'"):
            make_decoder(name, CharTokenizer("ab"), Knowledge(lexicon=WORDS))
    with pytest.raises(UserError, match="unknown decoder 'magic': choose one of greedy, beam"):
        make_decoder("magic", TOKENIZER)
    with pytest.raises(UserError, match="lexicon=from_train"):
        make_decoder("lexicon", TOKENIZER)
    with pytest.raises(UserError, match="none of the 1 words"):
        make_decoder("lexicon", TOKENIZER, Knowledge(lexicon=frozenset(["xyz"])))
    with pytest.raises(UserError, match="no use for a language model"):
        make_decoder("greedy", TOKENIZER, Knowledge(MODEL))


def test_a_list_of_words_is_read(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Ab\n\nba  B AH0\n;;; a comment\nba(2) B A\n")
    assert read_words(path) == {"ab", "ba"}
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no word"):
        read_words(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_words(path)
