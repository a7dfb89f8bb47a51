"""Self-training: users without transcripts train on what the server's model hears.

On every device a teacher transcribes the user's own speech; what passes the filters is what the
student trains on, until a later teacher does it again (Noisy Student, arXiv 2005.09629; federated,
with a teacher that is a running mean, arXiv 2106.08922). The labels never leave the device, and the
teacher follows from the models that the server has published: the privacy of the rounds is that of
the same rounds with true transcripts. How many users have labels left is as private as their
speech: sample all of them, and let the others send nothing
(`fedasr.privacy.sampling.SilentSampler`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.data.batching import Bucket, eval_batches
from fedasr.data.corpus import Corpus
from fedasr.decoding.ngram import NGram
from fedasr.errors import UserError
from fedasr.federated.client import Params
from fedasr.federated.metrics import RoundMetrics
from fedasr.federated.simulation import Simulation
from fedasr.feedback.corrections.corpora import RelabelledCorpus
from fedasr.feedback.joint import JointTraining
from fedasr.kernels.ctc import ctc_loss, greedy_decode
from fedasr.models.recogniser import INPUTS, Recogniser


class Hypothesis(NamedTuple):
    """What a teacher hears. user, number: whose utterance, and which of theirs. labels: int32 [u].

    confidence: p(labels | utterance) ^ (1 / u), in [0, 1], all alignments together; 0 for no label.
    """

    user: int
    number: int
    labels: np.ndarray
    confidence: float


Label = Callable[[Params, Corpus], Sequence[Hypothesis]]
Filter = Callable[[Hypothesis], bool]
Trainer = Simulation | JointTraining


class GreedyLabeller:
    """Transcribes by greedy CTC decoding; transcripts that a corpus has change nothing.

    Args:
      recogniser: of the teacher, with scores of tokens in each frame.
      buckets: padded shapes; every utterance must fit in one.
      batch_size: utterances at a time.

    Raises:
      UserError: a recogniser without such scores (RNN-T, and Whisper's decoder).
    """

    def __init__(
        self, recogniser: Recogniser, buckets: Sequence[Bucket], batch_size: int = 32
    ) -> None:
        scores = recogniser.scores
        if scores is None:
            raise UserError(
                "self-training needs scores of tokens in each frame: choose objective='ctc'"
            )
        self._buckets, self._batch_size = tuple(buckets), batch_size

        def compute(params, batch):
            log_probs, frames, *_ = scores(params, batch)
            labels, counts = greedy_decode(log_probs, frames)
            loss, _ = ctc_loss(log_probs, frames, labels, counts, stream=True)
            confidence = jnp.exp(-loss / jnp.maximum(counts, 1))
            return labels, counts, jnp.where(counts > 0, confidence, 0.0)

        self._compute: Any = jax.jit(compute)

    def __call__(self, params: Params, corpus: Corpus) -> list[Hypothesis]:
        """Every utterance once, in no particular order."""
        found = []
        for batch in eval_batches(corpus, self._buckets, self._batch_size, INPUTS, owners=True):
            users, numbers = batch.pop("user"), batch.pop("index")
            labels, counts, confidence = jax.device_get(self._compute(params, batch))
            for i in np.flatnonzero(batch["mask"]):
                own = np.asarray(labels[i, : counts[i]], np.int32)
                found.append(Hypothesis(int(users[i]), int(numbers[i]), own, float(confidence[i])))
        return found


def confident(least: float) -> Filter:
    """Keeps what the teacher gives a confidence of at least so much, in [0, 1].

    Raises:
      UserError: for another number.
    """
    if not 0 <= least <= 1:
        raise UserError(f"the least confidence must be in [0, 1], not {least}")
    return lambda hypothesis: hypothesis.confidence >= least


def likely(model: NGram, decode: Callable[[np.ndarray], str], least: float) -> Filter:
    """Keeps what a language model gives a mean log probability of at least so much a word.

    Args:
      model: of sentences that are no user's secret, such as the server's.
      decode: from labels to a text.
      least: nats a word, the end of the sentence counted as one; at most 0.
    """

    def keep(hypothesis: Hypothesis) -> bool:
        text = decode(hypothesis.labels)
        return model.sentence(text) / (len(text.split()) + 1) >= least

    return keep


class SelfTrainingState(NamedTuple):
    """student: state of the rounds. teacher: running mean of their models. labeller: the teacher
    that made the labels in use, from which they follow again when a state is restored.
    """

    student: Any
    teacher: Params
    labeller: Params

    @property
    def params(self) -> Params:
        """The student's model."""
        return self.student.params


class SelfTraining:
    """Federated rounds on users' own transcripts where they have some, else on a teacher's.

    Args:
      corpus: of all users.
      label: what a teacher hears, such as a `GreedyLabeller`.
      make: from the corpus as it is labelled to what trains on it. It has all users, some maybe
        without examples, and is called again for new labels: random numbers follow from the state.
      labelled: numbers of the users whose transcripts are true, and used.
      filters: a hypothesis is trained on if all of them keep it. One without labels never is.
      every: rounds between one labelling and the next.
      decay: of the running mean that teaches, a round; at 0 the teacher is the student itself.

    Raises:
      UserError: an argument out of range.
    """

    def __init__(
        self,
        corpus: Corpus,
        label: Label,
        make: Callable[[RelabelledCorpus], Trainer],
        *,
        labelled: Collection[int] = (),
        filters: Sequence[Filter] = (),
        every: int = 10,
        decay: float = 0.0,
    ) -> None:
        if every < 1 or not 0 <= decay < 1:
            raise UserError(
                f"self-training needs every >= 1 and 0 <= decay < 1, not {every} and {decay}"
            )
        self._corpus, self._label, self._make_trainer = corpus, label, make
        self._labelled, self._filters = frozenset(labelled), tuple(filters)
        if unknown := sorted(self._labelled - set(range(len(corpus.users)))):
            raise UserError(f"labelled: user {unknown[0]} is not in the corpus")
        self._every = every
        self._mean = jax.jit(lambda new, old: optax.incremental_update(new, old, 1 - decay))
        self._made: tuple[Params, Trainer] | None = None

    def labels(self, params: Params) -> dict[tuple[int, int], np.ndarray]:
        """{(user, number): labels int32} that a teacher of these parameters leaves to train on."""
        found = {
            (user, number): np.asarray(example["labels"], np.int32)
            for user in sorted(self._labelled)
            for number, example in enumerate(
                self._corpus.get(user, range(int(self._corpus.sizes[user])))
            )
        }
        for one in self._label(params, self._corpus):
            kept = len(one.labels) and all(keep(one) for keep in self._filters)
            if kept and one.user not in self._labelled:
                found[one.user, one.number] = one.labels
        return found

    def _trainer(self, labeller: Params) -> Trainer:
        if self._made is None or self._made[0] is not labeller:
            labels = self.labels(labeller)
            if not labels:
                raise UserError(
                    "no utterance has labels that pass the filters: lower what they ask for, or "
                    "start from a model that has learned more"
                )
            corpus = RelabelledCorpus(self._corpus, labels, everybody=True)
            self._made = labeller, self._make_trainer(corpus)
        return self._made[1]

    def init(self, params: Params) -> SelfTrainingState:
        """The state before the first round; `params` is the first teacher, too.

        Raises:
          UserError: nothing that it hears passes the filters.
        """
        student = self._trainer(params).init(params)
        return SelfTrainingState(student, student.params, params)

    def transfer(self, state: SelfTrainingState) -> SelfTrainingState:
        """Puts a state, such as a restored one, on every device."""
        student: Any = self._trainer(state.labeller).transfer(state.student)
        return state._replace(student=student)

    def run(
        self, state: SelfTrainingState, rounds: int
    ) -> Iterator[tuple[SelfTrainingState, RoundMetrics]]:
        """Trains, yielding the state and the federated round's metrics after each round.

        Raises:
          UserError: nothing that a teacher hears passes the filters.
        """
        for _ in range(rounds):
            done = int(state.student.round)
            if done and done % self._every == 0:
                state = state._replace(labeller=state.teacher)
            trainer: Any = self._trainer(state.labeller)
            ((student, metrics),) = trainer.run(state.student, 1)
            teacher = self._mean(student.params, state.teacher)
            state = SelfTrainingState(student, teacher, state.labeller)
            yield state, metrics
