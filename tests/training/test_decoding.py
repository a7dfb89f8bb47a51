"""Decoders, language models and lexica of a run: where they come from, and what is said of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.data.corpus import InMemoryCorpus
from fedasr.data.preparation.prepare import prepare
from fedasr.data.records import open_corpus, read_metadata
from fedasr.data.utterances import Utterance
from fedasr.decoding.ngram import estimate, write_arpa
from fedasr.errors import UserError
from fedasr.models.recogniser import Recogniser, recogniser
from fedasr.text import CharTokenizer, tokenizer_for
from fedasr.training import describe
from fedasr.training.builders import decoders
from fedasr.training.config import Config
from fedasr.training.evaluation import Evaluator
from fedasr.training.sections import Decoding, SeedTraining

TEXTS = {"seed": ["go"], "train": ["one two", "two six", "one"], "dev": ["six"], "test": ["two"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("decoding") / "data"
    sound = 0.1 * np.random.default_rng(0).standard_normal(16_000, np.float32), 16_000
    utterances = [
        Utterance(f"{split}{i}", split, text, split, lambda: sound)
        for split, texts in TEXTS.items()
        for i, text in enumerate(texts)
    ]
    prepare(utterances, directory, name="said")
    return directory


def knowledge(corpus, evaluated=("dev", "test"), **settings):
    tokenizer = tokenizer_for(read_metadata(corpus))
    return decoders.make_knowledge(Decoding(**settings), corpus, tokenizer, evaluated)


def test_a_model_and_a_lexicon_of_the_training_transcripts(corpus):
    found = knowledge(corpus, lm="from_train", lexicon="from_train", order=2, lm_weight=0.3)
    assert found.lexicon == {"one", "two", "six"} == found.model.vocabulary
    expected = estimate(TEXTS["train"], 2, {"one", "two", "six"})
    for text in ("one two", "six", "go"):
        assert found.model.sentence(text) == pytest.approx(expected.sentence(text))
    assert found.beam.lm_weight == 0.3
    both = knowledge(corpus, lexicon="from_train+seed")
    assert both.lexicon == {"one", "two", "six", "go"} and both.model is None
    tokenizer = tokenizer_for(read_metadata(corpus))
    texts = decoders.transcripts(open_corpus(corpus, "train"), tokenizer)
    assert sorted(texts) == sorted(TEXTS["train"])


def test_files(corpus, tmp_path):
    write_arpa(estimate(["one six"], 2), tmp_path / "lm.arpa")
    (tmp_path / "words").write_text("one\nSIX\n")
    found = knowledge(corpus, lm=str(tmp_path / "lm.arpa"), lexicon=str(tmp_path / "words"))
    assert found.model.vocabulary == found.lexicon == {"one", "six"}


def test_nothing_is_made_of_what_is_evaluated(corpus):
    for name in ("from_dev", "from_train+test", "from_test[:50%]"):
        with pytest.raises(UserError, match="what its error rate is measured with"):
            knowledge(corpus, lm=name)
    assert knowledge(corpus, evaluated=("test",), lm="from_dev").model.vocabulary == {"six"}
    with pytest.raises(UserError, match="nosuch"):
        knowledge(corpus, lm="from_nosuch")


def test_mistakes_before_the_data_is_looked_at():
    for settings, match in (
        ({"lm": "from_train"}, "decoding.name='beam'"),
        ({"name": "lexicon"}, "needs decoding.lexicon or lm"),
        ({"name": "beam", "lm": "from_%"}, "decoding.lm=from_%"),
    ):
        with pytest.raises(UserError, match=match):
            decoders.check(Config(decoding=Decoding(**settings)))
    config = Config(decoding=Decoding(name="beam"))
    options = {**config.model.options, "objective": "rnnt"}
    model = dataclasses.replace(config.model, options=options)
    with pytest.raises(UserError, match="greedy"):
        decoders.check(dataclasses.replace(config, model=model))


def test_what_privacy_does_not_cover():
    def said(**settings):
        config = Config(decoding=Decoding(**settings))
        before = describe.not_covered(Config(), True)
        return [text for text in describe.not_covered(config, True) if text not in before]

    assert said() == []
    (text,) = said(name="beam", lm="from_train")
    assert "transcripts of 'train'" in text and "language model" in text
    (both,) = said(name="lexicon", lm="from_train", lexicon="from_train")  # once, not twice
    assert "language model and lexicon were made" in both
    assert len(said(name="lexicon", lm="from_train", lexicon="words.txt")) == 2
    assert "words.txt" in said(name="lexicon", lexicon="words.txt")[0]
    assert said(name="beam", lm="from_seed") == []  # of users whose privacy nobody claims
    config = Config(decoding=Decoding(name="beam", lm="from_seed"))
    config = dataclasses.replace(config, seed_training=SeedTraining(split="public"))
    assert decoders.not_covered(config)


def test_an_evaluator_decodes_the_scores_of_each_utterance():
    """True frames alone, in the order of the corpus."""
    tokenizer = CharTokenizer()
    ids = {word: tokenizer.encode(word) for word in ("go", "stop")}

    def scores(params, batch):
        tokens = batch["features"][..., 0].astype(jnp.int32)
        hot = jnp.where(jnp.arange(tokenizer.vocab_size) == tokens[..., None], 0.0, -9.0)
        return hot, batch["features_length"], jnp.zeros(len(tokens)), batch["mask"]

    corpus = InMemoryCorpus(
        {
            word: [{"features": np.float16(own)[:, None], "labels": own}]
            for word, own in ids.items()
        },
        ragged=("features", "labels"),
    )
    model = Recogniser(lambda key: 1.0, lambda *_: None, lambda *_: None, scores)
    lengths = []

    def decode(log_probs):
        lengths.append(log_probs.shape)
        return tokenizer.decode(log_probs.argmax(1)).upper()

    evaluator = Evaluator(model, [{"features": 8, "labels": 8}], 2, decoder=decode)
    references, hypotheses, _ = evaluator.transcripts(jnp.float32(1), corpus)
    assert references == ["go", "stop"] and hypotheses == ["GO", "STOP"]
    assert lengths == [(2, 30), (4, 30)]


def test_scores_are_those_of_greedy_decoding_and_of_the_loss():
    small = {"dim": 16, "blocks": 1, "heads": 2, "mlp": 16, "features": 4, "vocab": 5}
    model = recogniser("transformer", **small)

    params = model.init(jax.random.key(0))
    batch = {
        "features": jax.random.normal(jax.random.key(1), (2, 24, 4)),
        "features_length": jnp.int32([24, 12]),
        "labels": jnp.int32([[1, 2], [3, 0]]),
        "labels_length": jnp.int32([2, 1]),
        "mask": jnp.bool_([True, True]),
    }
    tokens, counts, loss, valid = model.evaluate(params, batch)
    log_probs, lengths, same_loss, same_valid = model.scores(params, batch)
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(lengths, [8, 4])
    np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
    np.testing.assert_array_equal(same_valid, valid)
    for i in range(2):
        path = np.asarray(log_probs[i, : lengths[i]]).argmax(-1)
        kept = [
            int(t) for t, before in zip(path, [0, *path[:-1]], strict=True) if t not in (0, before)
        ]
        assert kept == list(np.asarray(tokens[i, : counts[i]]))
    rnnt = recogniser("transformer", objective="rnnt", **small)
    assert rnnt.scores is None
    with pytest.raises(UserError, match="choose the decoder 'greedy'"):
        Evaluator(rnnt, [{"features": 24, "labels": 4}], decoder=lambda scores: "")
