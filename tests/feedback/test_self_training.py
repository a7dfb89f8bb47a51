import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedasr.data.batching import Batching
from fedasr.data.corpus import InMemoryCorpus
from fedasr.decoding import ngram
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import local_training
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.feedback.corrections.corpora import RelabelledCorpus
from fedasr.feedback.joint import JointTraining
from fedasr.feedback.self_training import (
    GreedyLabeller,
    Hypothesis,
    SelfTraining,
    confident,
    likely,
)
from fedasr.models.recogniser import Recogniser
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import FixedSizeSampler, SilentSampler
from fedasr.text import CharTokenizer
from fedasr.training.central import CentralTraining
from fedasr.training.checkpoint import Checkpointer

ONE = jax.devices()[:1]


# ------------------------------------------------------------------------------ what is heard


def frames_are_scores():
    """A recogniser whose features are the scores of its tokens."""

    def scores(params, batch):
        del params
        found = jax.nn.log_softmax(batch["features"].astype(jnp.float32))
        wrong = jnp.zeros(len(batch["mask"]), bool)  # as of transcripts that cannot be aligned
        return found, batch["features_length"], jnp.zeros(len(wrong)), wrong

    def nothing(*args):
        raise NotImplementedError

    return Recogniser(nothing, nothing, nothing, scores)


def collapse(path):
    return tuple(token for token, _ in itertools.groupby(path) if token)


def by_hand(features):
    """Greedy labels, and their probability by all paths of tokens."""
    log_probs = features - np.logaddexp.reduce(features, axis=1, keepdims=True)
    labels = collapse(log_probs.argmax(axis=1))
    total = 0.0
    for path in itertools.product(range(features.shape[1]), repeat=len(features)):
        if collapse(path) == labels:
            total += math.exp(sum(log_probs[t, token] for t, token in enumerate(path)))
    return labels, total ** (1 / len(labels)) if labels else 0.0


def spoken(lengths, transcript):
    rng = np.random.default_rng(0)
    examples = [
        {"features": rng.normal(size=(n, 3)).astype(np.float32), "labels": transcript}
        for n in lengths
    ]
    examples[0]["features"][:, 0] += 9  # nothing is heard
    return InMemoryCorpus({"a": examples[:2], "b": examples[2:]}, ["features", "labels"])


@pytest.mark.parametrize("room", [5, 8])
@pytest.mark.parametrize("transcript", [np.int32([]), np.int32([1, 1, 2, 1, 2])])
def test_what_is_heard_and_how_likely_it_is_by_all_alignments(room, transcript):
    corpus = spoken((3, 5, 4, 5, 1), transcript)
    labeller = GreedyLabeller(frames_are_scores(), [{"features": room, "labels": room}], 2)
    found = {(one.user, one.number): one for one in labeller({}, corpus)}
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    for (user, index), one in found.items():
        labels, confidence = by_hand(corpus.get(user, [index])[0]["features"].astype(np.float64))
        assert tuple(one.labels) == labels and one.labels.dtype == np.int32
        assert one.confidence == pytest.approx(confidence, rel=1e-5)
    assert found[0, 0].confidence == 0 and not len(found[0, 0].labels)


def test_filters():
    def hypothesis(text, confidence=0.5):
        return Hypothesis(0, 0, CharTokenizer().encode(text), confidence)

    assert confident(0.5)(hypothesis("two")) and not confident(0.51)(hypothesis("two"))
    model = ngram.estimate(["one two", "two one", "one one two"], 2)
    at_least = model.sentence("one two") / 3
    keep = likely(model, CharTokenizer().decode, at_least - 1e-6)
    assert keep(hypothesis("one two")) and not keep(hypothesis("two two two"))
    assert not keep(hypothesis("wonder"))


# ------------------------------------------------------------------------------- the rounds

START = {"w": np.float32([0.3, -0.1, 0.0])}
TRUTH = np.float32([1, -1, 0.5])


def both_sides(users, seed=0):
    """Points, and on which side of a plane they lie (1 or 2) as the label."""
    rng = np.random.default_rng(seed)

    def example():
        x = rng.normal(size=3).astype(np.float32)
        return {"x": x, "labels": np.int32([1 + (x @ TRUTH > 0)])}

    return InMemoryCorpus({f"u{i}": [example() for _ in range(4)] for i in range(users)}, [])


def logistic(params, batch, key):
    del key
    sides = 2.0 * batch["labels"][:, 0] - 3
    losses = jnp.log1p(jnp.exp(-sides * (batch["x"] @ params["w"])))
    return jnp.sum(losses * batch["mask"]) / jnp.maximum(batch["mask"].sum(), 1), {}


def hear(params, corpus):
    found = []
    for user, size in enumerate(corpus.sizes):
        for index, example in enumerate(corpus.get(user, range(int(size)))):
            score = float(example["x"] @ np.asarray(params["w"]))
            confidence = 1 / (1 + math.exp(-abs(score)))
            found.append(Hypothesis(user, index, np.int32([1 + (score > 0)]), confidence))
    return found


CORPUS = both_sides(6)


def simulate(corpus):
    speaking = tuple(np.flatnonzero(corpus.sizes).tolist())
    return Simulation(
        corpus,
        Mechanism(0.5, "uniform", 0.1, SilentSampler(FixedSizeSampler(6, 4, seed=0), speaking)),
        FedAvg(local_training(logistic, optax.sgd(0.3)), optax.adam(0.1)),
        Batching(2, steps=2),
        hardware=Hardware(ONE),
    )


def self_training(**options):
    options = {"labelled": (1,), "filters": [confident(0.6)], "every": 2, "decay": 0.5} | options
    return SelfTraining(CORPUS, hear, simulate, **options)


def test_with_transcripts_of_all_it_is_the_rounds_themselves():
    trainer = self_training(labelled=range(6))
    plain = simulate(CORPUS)
    *_, (state, metrics) = trainer.run(trainer.init(START), 3)
    *_, (expected, of_plain) = plain.run(plain.init(START), 3)
    np.testing.assert_array_equal(state.params["w"], expected.params["w"])
    assert metrics.loss == of_plain.loss


def test_labels_are_of_the_teacher_and_the_true_ones_where_there_are_some():

    def mishear(params, corpus):  # so that what is true differs from what is heard
        return [one._replace(labels=3 - one.labels) for one in hear(params, corpus)]

    def late(one):
        return one.number > 0

    filters = [confident(0.6), late]
    trainer = SelfTraining(CORPUS, mishear, simulate, labelled=[1], filters=filters)
    labels = trainer.labels(START)
    for index, example in enumerate(CORPUS.get(1, range(4))):
        np.testing.assert_array_equal(labels[1, index], example["labels"])
    assert any(
        one.user == 1 and late(one) and one.labels != labels[1, one.number] and confident(0.6)(one)
        for one in mishear(START, CORPUS)
    )
    heard = {(one.user, one.number): one for one in mishear(START, CORPUS) if one.user != 1}
    kept = {place for place, one in heard.items() if one.confidence >= 0.6 and late(one)}
    assert {place for place in labels if place[0] != 1} == kept and 0 < len(kept) < len(heard)
    for place in kept:
        np.testing.assert_array_equal(labels[place], heard[place].labels)


def test_nobody_is_left_out_of_the_population_and_empty_labels_of_training():
    seen = []

    def make(corpus):
        seen.append(corpus)
        return simulate(corpus)

    def deaf(params, corpus):
        return [one._replace(labels=np.int32([]), confidence=1.0) for one in hear(params, corpus)]

    trainer = SelfTraining(CORPUS, deaf, make, labelled=[1, 4])
    trainer.init(START)
    assert list(seen[0].users) == list(CORPUS.users)
    assert seen[0].sizes.tolist() == [0, 4, 0, 0, 4, 0]


def test_the_teacher_is_a_running_mean_and_labels_anew_every_so_many_rounds():
    trainer = self_training()
    state = trainer.init(START)
    teacher = START["w"]
    for round in range(1, 6):
        before = state
        ((state, _),) = trainer.run(state, 1)
        teacher = 0.5 * teacher + 0.5 * np.asarray(state.params["w"])
        np.testing.assert_allclose(state.teacher["w"], teacher, rtol=1e-6)
        expected = before.teacher if round in (3, 5) else before.labeller
        np.testing.assert_array_equal(state.labeller["w"], expected["w"])
        # The round is one of the plain rounds on those labels.
        corpus = RelabelledCorpus(CORPUS, trainer.labels(state.labeller), True)
        ((plain, _),) = simulate(corpus).run(before.student, 1)
        np.testing.assert_array_equal(state.params["w"], plain.params["w"])
    alone = self_training(decay=0.0)
    *_, (state, _) = alone.run(alone.init(START), 2)
    np.testing.assert_array_equal(state.teacher["w"], state.params["w"])


def test_a_restored_state_goes_on_bit_for_bit(tmp_path):
    def make(corpus):
        central = CentralTraining(
            CORPUS, logistic, optax.adam(0.02), 4, seed=3, buckets=(), devices=ONE
        )
        return JointTraining(simulate(corpus), central, 2)

    def trainer():
        return SelfTraining(CORPUS, hear, make, labelled=[1], every=2, decay=0.9)

    first = trainer()
    *_, (whole, _) = first.run(first.init(START), 5)
    again = trainer()
    *_, (half, _) = again.run(again.init(START), 3)
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(3, half, {})
        restored, _ = checkpointer.restore(3, jax.device_get(half))
    anew = trainer()
    *_, (resumed, _) = anew.run(anew.transfer(restored), 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))


def test_mistakes_are_one_line():
    for options in ({"every": 0}, {"decay": 1.0}, {"decay": -0.1}):
        with pytest.raises(UserError, match="every >= 1 and 0 <= decay < 1"):
            self_training(**options)
    with pytest.raises(UserError, match="user 6 is not"):
        self_training(labelled=[2, 6])
    with pytest.raises(UserError, match="pass the filters"):
        self_training(labelled=(), filters=[lambda one: False]).init(START)
    with pytest.raises(UserError, match="least confidence"):
        confident(1.5)
    with pytest.raises(UserError, match="objective='ctc'"):
        GreedyLabeller(frames_are_scores()._replace(scores=None), [])
