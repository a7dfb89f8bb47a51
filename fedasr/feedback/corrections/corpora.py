"""From a corpus to its hypotheses, and from accepted texts to a corpus of their own."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedasr.data.corpus import Corpus, Example, LazyUsers
from fedasr.errors import UserError
from fedasr.federated.client import Params
from fedasr.feedback.corrections.edits import Feedback
from fedasr.text import CharTokenizer
from fedasr.training.evaluation import Evaluator


def transcribe(
    evaluator: Evaluator, params: Params, corpus: Corpus
) -> tuple[list[list[str]], list[list[str]]]:
    """References and hypotheses of a corpus: `[user][utterance]`, in the corpus's order.

    Args:
      evaluator: of the stale recogniser, with a single bucket: several would change the order.
      params: its parameters.
      corpus: with "features" and "labels".
    """
    references, hypotheses, _ = evaluator.transcripts(params, corpus)
    ends = np.cumsum(corpus.sizes)[:-1]

    def by_user(texts: list[str]) -> list[list[str]]:
        return [part.tolist() for part in np.split(np.asarray(texts, object), ends)]

    return by_user(references), by_user(hypotheses)


class RelabelledCorpus:
    """Some utterances of a corpus with other labels.

    Args:
      corpus: where the utterances are.
      labels: {(user, index): int32 [labels]}, by the corpus's numbers.
      everybody: whether users who have none of them are kept, without examples (who must not be in
        a cohort then: see `fedasr.privacy.sampling.SilentSampler`), or left out.

    Raises:
      UserError: no label at all, or one of an utterance that is not there.
    """

    def __init__(
        self,
        corpus: Corpus,
        labels: Mapping[tuple[int, int], np.ndarray],
        everybody: bool = False,
    ) -> None:
        if not labels:
            raise UserError("no utterance is left: nobody's corrections passed the filters")
        self._corpus = corpus
        rows: dict[int, list[tuple[int, np.ndarray]]] = {}
        if everybody:
            rows = {user: [] for user in range(len(corpus.users))}
        for user, index in sorted(labels):
            if not (0 <= user < len(corpus.users) and 0 <= index < corpus.sizes[user]):
                raise UserError(f"the corpus has no utterance {index} of user {user}")
            labelled = (index, np.asarray(labels[user, index], np.int32))
            rows.setdefault(user, []).append(labelled)
        self._rows = list(rows.values())
        self._owners = np.asarray(list(rows), np.int64)
        self.sizes = np.asarray([len(rows) for rows in self._rows], np.int64)

    @property
    def users(self) -> Sequence[str]:
        """User ids, sorted."""
        return LazyUsers(len(self._rows), lambda i: self._corpus.users[int(self._owners[i])])

    @property
    def owners(self) -> np.ndarray:
        """The users' numbers in the corpus, int64 [users]."""
        return self._owners

    def _of(self, user: int) -> list[tuple[int, np.ndarray]]:
        if not 0 <= user < len(self._rows):
            raise IndexError(f"user {user} is not in [0, {len(self._rows)})")
        return self._rows[user]

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        rows = self._of(user)
        kept = [index for index, _ in rows]
        lengths = self._corpus.lengths(int(self._owners[user]))
        out = {name: np.asarray(values)[np.asarray(kept, int)] for name, values in lengths.items()}
        return out | {"labels": np.asarray([len(labels) for _, labels in rows], np.int32)}

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """See `fedasr.data.corpus.Corpus`."""
        rows = self._of(user)
        if not all(0 <= i < len(rows) for i in indices):
            raise IndexError(f"examples {list(indices)} are not in [0, {len(rows)})")
        examples = self._corpus.get(int(self._owners[user]), [rows[i][0] for i in indices])
        return [
            {**example, "labels": rows[i][1]} for example, i in zip(examples, indices, strict=True)
        ]


def corrected_corpus(
    corpus: Corpus,
    feedback: Sequence[Feedback],
    texts: Sequence[str | None],
    tokenizer: CharTokenizer,
    pad_space: bool = True,
    everybody: bool = False,
) -> RelabelledCorpus:
    """The users' corrected utterances as a corpus of their own.

    Args:
      corpus: that the feedback is about.
      feedback: edited utterances.
      texts: what is trained on for each of them, such as `Review.label`; None for nothing.
      tokenizer: of the corpus. pad_space: as it was prepared.
      everybody: whether users who have none left are kept, see `RelabelledCorpus`.

    Raises:
      UserError: nothing is left, or a text outside the alphabet.
    """
    labels = {
        (one.user, one.index): tokenizer.encode(text, pad_space)
        for one, text in zip(feedback, texts, strict=True)
        if text is not None
    }
    return RelabelledCorpus(corpus, labels, everybody)
