"""n-best lists judged by a causal language model, and sentences of phonemes."""

import math

import numpy as np
import pytest

from fedasr.decoding.beam import BeamConfig, Hypothesis
from fedasr.decoding.ngram import estimate
from fedasr.decoding.rescoring import CausalScorer, RescoringConfig, rescore
from fedasr.decoding.sentences import make_search, sentence_decoder
from fedasr.errors import UserError
from fedasr.text import CharTokenizer, PhonemeTokenizer

NBEST = [
    Hypothesis("i read", ("i", "read"), -1.0, -2.0, -3.0),
    Hypothesis("", (), -1.5, -1.0, -1.0),
    Hypothesis("i red", ("i", "red"), -2.0, -1.0, -5.0),
    Hypothesis("eye red", ("eye", "red"), -3.0, -0.5, -9.0),
]


def judge(texts):
    return [{"i read": -4.0, "i red": -4.2, "eye red": -30.0}[text] for text in texts]


@pytest.mark.parametrize(
    ("config", "best"),
    [
        (RescoringConfig(), "i red"),  # -4.2 - .5 against -4 - 1
        (RescoringConfig(acoustic_scale=0.1), "i read"),
        (RescoringConfig(alpha=0.0), "i read"),
        (RescoringConfig(nbest=1), "i read"),
    ],
)
def test_the_best_total_is_taken(config, best):
    found = rescore(NBEST, judge, config)
    said = [h for h in NBEST if h.text][: config.nbest]
    totals = np.array(
        [
            config.alpha * judge([h.text])[0]
            + (1 - config.alpha) * h.language
            + config.acoustic_scale * h.acoustic
            for h in said
        ]
    )
    assert found.text == best == said[int(totals.argmax())].text
    assert found.confidence == pytest.approx(np.exp(totals.max()) / np.exp(totals).sum())


def test_nothing_said_is_nothing():
    assert rescore(NBEST[1:2], judge) == ("", 0.0)
    with pytest.raises(UserError, match="alpha"):
        RescoringConfig(alpha=2.0)


def test_a_causal_model_scores_token_by_token(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    torch.manual_seed(0)
    vocab = {c: i for i, c in enumerate(" abcdefghijklmnopqrstuvwxyz'")}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="'"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path)
    sizes = {"vocab_size": len(vocab), "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    gpt = transformers.GPT2LMHeadModel(config).eval()
    gpt.save_pretrained(tmp_path)
    texts = ["i read it", "a", "no", "the longest of them"]
    found = CausalScorer(tmp_path, batch_size=3)(texts)
    for text, value in zip(texts, found, strict=True):
        ids = [vocab[c] for c in text]
        expected = 0.0
        for i in range(1, len(ids)):  # the first is given
            with torch.no_grad():
                logits = gpt(torch.tensor([ids[:i]])).logits[0, -1].double().numpy()
            expected += logits[ids[i]] - np.log(np.exp(logits).sum())
        assert value == pytest.approx(expected, abs=1e-4)
    assert found[1] == 0 and found[0] < -10
    with pytest.raises(UserError, match="no causal language model"):
        CausalScorer(tmp_path / "nothing")


def test_without_transformers_a_line_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"fedasr\[rescoring\]"):
        CausalScorer("gpt2")


PRONUNCIATIONS = {
    "read": [("R", "EH", "D"), ("R", "IY", "D")],
    "red": [("R", "EH", "D")],
    "i": [("AY",)],
    "unheard": [("AH", "N")],
}


def frames(names, tokenizer, sharp=6.0):
    ids = [tokenizer.characters.index(name) + 1 for name in names]
    x = np.zeros((2 * len(ids), tokenizer.vocab_size))
    x[np.arange(0, len(x), 2), ids] = sharp
    x[1::2, 0] = sharp
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def test_phonemes_become_words_of_the_language_model():
    tokenizer = PhonemeTokenizer()
    model = estimate(["i read", "i read", "red i"], 2)
    search = make_search(tokenizer, model, PRONUNCIATIONS, BeamConfig(beam=64))
    decode = sentence_decoder(search, PRONUNCIATIONS)
    assert decode(frames("AY SIL R EH D SIL".split(), tokenizer)) == "i read"
    assert decode(frames("R EH D SIL AY SIL".split(), tokenizer)) == "red i"
    # The judge has the last word among those that sound alike.
    judged = sentence_decoder(search, PRONUNCIATIONS, lambda texts: [-len(t) for t in texts])
    assert judged(frames("AY SIL R EH D SIL".split(), tokenizer)) != ""
    # Half a word at the end is none.
    assert decode(frames("AY SIL R EH".split(), tokenizer)).split()[0] == "i"
    assert set(decode(frames(["R", "EH"], tokenizer)).split()) <= PRONUNCIATIONS.keys()


def test_mistakes():
    phonemes = PhonemeTokenizer()
    with pytest.raises(UserError, match="give pronunciations"):
        make_search(phonemes)
    with pytest.raises(UserError, match="none of the language model's words"):
        make_search(phonemes, estimate(["zebra zebra"], 2), PRONUNCIATIONS)
    with pytest.raises(UserError, match="no phonemes"):
        make_search(CharTokenizer(), None, PRONUNCIATIONS)
    assert not math.isnan(rescore(NBEST, judge).confidence)
