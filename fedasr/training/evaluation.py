"""Word and character error rates of a recogniser over a corpus."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedasr.data.batching import Bucket, eval_batches
from fedasr.data.corpus import Corpus
from fedasr.federated.cohort import client_mesh, client_sharding, replicated
from fedasr.models.recogniser import ARRAYS, Recogniser
from fedasr.text import CharTokenizer
from fedasr.training.metrics import ErrorRate, char_errors, word_errors


class Evaluator:
    """Greedy decoding of every utterance of a corpus, in batches of one compiled shape a bucket.

    Args:
      recogniser: the model.
      buckets: padded shapes; every utterance must fit in one.
      batch_size: utterances at a time, rounded up to a multiple of the devices.
      devices: default all local devices.
      tokenizer: that wrote the labels; default that of the 29 characters.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        buckets: Sequence[Bucket],
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
        tokenizer: CharTokenizer | None = None,
    ) -> None:
        mesh = client_mesh(devices)
        self._sharding, self._whole = client_sharding(mesh), replicated(mesh)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._buckets = tuple(buckets)
        self._evaluate = jax.jit(recogniser.evaluate)
        self._tokenizer = tokenizer or CharTokenizer()

    def transcripts(self, params: Any, corpus: Corpus) -> tuple[list[str], list[str], float]:
        """References, hypotheses (in the same order) and the mean loss of alignable utterances."""
        references, hypotheses, losses, count = [], [], 0.0, 0
        params = jax.device_put(params, self._whole)  # placed otherwise they would compile again
        for batch in eval_batches(corpus, self._buckets, self._batch_size, ARRAYS):
            on_device = jax.device_put(batch, self._sharding)
            tokens, lengths, loss, valid = jax.device_get(self._evaluate(params, on_device))
            losses += float(loss.sum())
            count += int(valid.sum())
            for i in np.flatnonzero(batch["mask"]):
                labels = batch["labels"][i, : batch["labels_length"][i]]
                references.append(self._tokenizer.decode(labels))
                hypotheses.append(self._tokenizer.decode(tokens[i, : lengths[i]]))
        return references, hypotheses, losses / max(count, 1)

    def __call__(self, params: Any, corpus: Corpus) -> dict[str, float]:
        """{"wer": percent, "cer": percent, "loss": nats per utterance}."""
        references, hypotheses, loss = self.transcripts(params, corpus)
        rates: tuple[ErrorRate, ErrorRate] = (
            word_errors(references, hypotheses),
            char_errors(references, hypotheses),
        )
        return {"wer": rates[0].percent, "cer": rates[1].percent, "loss": loss}
