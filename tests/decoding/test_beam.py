import itertools
import math

import numpy as np
import pytest

from fedasr.decoding.beam import BeamConfig, BeamDecoder
from fedasr.decoding.ngram import END, estimate
from fedasr.errors import UserError

TOKENS = "ab "
EVERYTHING = {"beam": 100_000, "min_log_prob": -math.inf}
MODEL = estimate(["ab a", "ab ab", "a b", "ab"], 2, ["ab", "a"])


def scores(frames, seed=0, tokens=len(TOKENS)):
    x = np.random.default_rng(seed).normal(size=(frames, tokens + 1)) * 1.5
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def collapsed(path):
    return tuple(k for k, _ in itertools.groupby(path) if k)


def by_text(log_probs):
    """Log probability of every label sequence: the sum over all paths."""
    found = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        value = sum(log_probs[t, k] for t, k in enumerate(path))
        labels = collapsed(path)
        found[labels] = np.logaddexp(found.get(labels, -np.inf), value)
    return found


def language(words, config, lexicon):
    """What the search adds for words, from its description."""
    context, total = MODEL.start, 0.0
    for word in (*words, END):
        value, context = MODEL.score(context, word)
        total += config.lm_weight * value
    unknown = sum(word not in lexicon for word in words)
    return total + config.word_bonus * len(words) - config.unknown_penalty * unknown


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_search_finds_what_trying_everything_finds(seed):
    config = BeamConfig(lm_weight=0.7, word_bonus=0.4, unknown_penalty=1.3, **EVERYTHING)
    decoder = BeamDecoder(TOKENS, " ", MODEL, config=config)
    log_probs = scores(5, seed)
    best = {}
    for labels, acoustic in by_text(log_probs).items():
        words = tuple("".join(TOKENS[k - 1] for k in labels).split())
        value = acoustic + language(words, config, {"ab", "a"})
        best[words] = max(best.get(words, -np.inf), value)
    found = {h.words: h.score for h in decoder.best(log_probs, 10_000)}
    assert found.keys() == best.keys()
    for words, value in best.items():
        assert found[words] == pytest.approx(value, abs=1e-9)
    assert decoder(log_probs).score == pytest.approx(max(best.values()))


def test_without_a_model_the_score_is_that_of_ctc():
    log_probs = scores(5, 7)
    expected = by_text(log_probs)
    decoder = BeamDecoder(TOKENS, " ", config=BeamConfig(**EVERYTHING))
    top = max(expected, key=expected.get)
    assert decoder(log_probs).text == "".join(TOKENS[k - 1] for k in top).strip()
    assert decoder(log_probs).score == pytest.approx(expected[top])


def spelled(text, tokens=TOKENS, sure=0.9):
    """Frames that nearly spell a text, a blank after each letter."""
    ids = {t: i for i, t in enumerate(tokens, start=1)}
    rows = []
    for token in text:
        for k in (ids[token], 0):
            row = np.full(len(tokens) + 1, (1 - sure) / len(tokens))
            row[k] = sure
            rows.append(row)
    return np.log(rows)


def test_a_blank_penalty_is_taken_in_every_frame():
    """Kaldi's, of the published decoders: the scores that are searched sum to less than one."""
    found = scores(4, seed=3)
    lowered = found.copy()
    lowered[:, 0] -= np.log(11)
    config = BeamConfig(lm_weight=0.7, **EVERYTHING)
    penalised = BeamDecoder(
        TOKENS, " ", MODEL, config=BeamConfig(lm_weight=0.7, blank_penalty=np.log(11), **EVERYTHING)
    )
    expected = BeamDecoder(TOKENS, " ", MODEL, config=config).best(lowered, 20)
    got = penalised.best(found, 20)
    assert [h.text for h in got] == [h.text for h in expected]
    assert [h.score for h in got] == pytest.approx([h.score for h in expected])
    assert got[0].score != pytest.approx(
        BeamDecoder(TOKENS, " ", MODEL, config=config).best(found, 1)[0].score
    )


def test_words_outside_the_lexicon_are_spelled_at_a_price():
    said = spelled("ab bba")
    known = BeamDecoder(TOKENS, " ", MODEL, config=BeamConfig(unknown_penalty=1.0))
    assert known(said).text == "ab bba"
    assert known(said).language == pytest.approx(MODEL.sentence("ab anything"))
    closed = BeamDecoder(TOKENS, " ", MODEL, config=BeamConfig(unknown_penalty=1e6))
    assert set(closed(said).words) <= {"ab", "a"}


def test_a_word_that_only_begins_like_one_of_the_lexicon_is_unknown():
    model = estimate(["aab", "aab"], 2)
    config = BeamConfig(unknown_penalty=2.5)
    found = BeamDecoder(TOKENS, " ", model, config=config)(spelled("aa", sure=0.9999))
    assert found.text == "aa"
    assert found.score == pytest.approx(found.acoustic + model.sentence("aa") - 2.5)


def test_the_language_model_mends_what_was_heard():
    x = spelled("ab bb")
    x[6] = np.log([0.02, 0.46, 0.5, 0.02])  # "b" is only a little likelier than "a" ...
    model = estimate(["ab ab"] * 8 + ["ab"], 2)
    assert BeamDecoder(TOKENS, " ")(x).text == "ab bb"
    assert BeamDecoder(TOKENS, " ", model)(x).text == "ab ab"


def test_separators_at_the_ends_and_in_a_row_write_nothing():
    found = BeamDecoder(TOKENS, " ", MODEL)(spelled(" ab  a "))
    assert found.text == "ab a"
    assert found.language == pytest.approx(MODEL.sentence("ab a"))


def test_no_frames_and_silence():
    decoder = BeamDecoder(TOKENS, " ", MODEL)
    assert decoder(np.zeros((0, 4))).text == ""
    silence = np.log(np.full((9, 4), 1e-9) + np.eye(4)[0])
    assert decoder(silence).text == ""
    with pytest.raises(ValueError, match="4"):
        decoder(np.zeros((3, 5)))


def test_homophones_are_told_apart_by_the_model():
    phonemes = ["T", "UW", "SIL"]
    lexicon = {"two": [("T", "UW")], "too": [("T", "UW")]}
    model = estimate(["two two two too", "two two too", "two too", "two two too"], 2)
    decoder = BeamDecoder(phonemes, "SIL", model, lexicon)
    x = spelled(["T", "UW", "SIL", "T", "UW"], phonemes)
    assert decoder(x).text == "two too"
    unknown = spelled(["T", "T"], phonemes, 0.99999)
    assert decoder(unknown).text == "T-T"


def test_a_narrow_search_keeps_to_the_best():
    log_probs = scores(30, 3)
    values = [
        BeamDecoder(TOKENS, " ", MODEL, config=BeamConfig(beam=n, min_log_prob=-math.inf))(
            log_probs
        ).score
        for n in (1, 4, 64)
    ]
    assert values == sorted(values)


def test_mistakes():
    with pytest.raises(UserError, match="each once"):
        BeamDecoder("ab", " ")
    with pytest.raises(UserError, match="'abc'"):
        BeamDecoder(TOKENS, " ", None, {"abc": ["abc"]})
    with pytest.raises(UserError, match="beam"):
        BeamConfig(beam=0)
