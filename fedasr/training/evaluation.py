"""Word and character error rates of a recogniser over a corpus."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedasr.data.batching import Bucket, eval_batches
from fedasr.data.corpus import Corpus
from fedasr.federated.cohort import AXIS, client_mesh, client_sharding, model_sharding
from fedasr.federated.local import Layout
from fedasr.models.recogniser import ARRAYS, Recogniser
from fedasr.text import CharTokenizer, Tokenizer
from fedasr.training.metrics import ErrorRate, char_errors, word_errors


class Evaluator:
    """Greedy decoding of every utterance of a corpus, in batches of one compiled shape a bucket.

    Args:
      recogniser: the model.
      buckets: padded shapes; every utterance must fit in one.
      batch_size: utterances at a time, rounded up to a multiple of the devices.
      devices: of this process; default all.
      tokenizer: that wrote the labels; default that of the 29 characters.
      layout: of local parameters, to evaluate users with their own.
      model_devices: devices that hold the model together, see `client_mesh`.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        buckets: Sequence[Bucket],
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
        tokenizer: Tokenizer | None = None,
        layout: Layout | None = None,
        model_devices: int = 1,
    ) -> None:
        self._mesh = client_mesh(devices or jax.local_devices(), model_devices)
        self._sharding, lanes = client_sharding(self._mesh), self._mesh.shape[AXIS]
        self._batch_size = -(-batch_size // lanes) * lanes
        self._buckets = tuple(buckets)
        self._evaluate = jax.jit(recogniser.evaluate)
        self._tokenizer = tokenizer or CharTokenizer()

        def one(params, row, example):
            batch = jax.tree.map(lambda x: x[None], example)
            outputs = recogniser.evaluate(layout.insert(params, row), batch)
            return jax.tree.map(lambda x: x[0], outputs)

        self._evaluate_own = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))

    def transcripts(
        self, params: Any, corpus: Corpus, rows: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> tuple[list[str], list[str], float]:
        """References, hypotheses (in the same order) and the mean loss of alignable utterances.

        Args:
          params: of the model.
          corpus: what to decode.
          rows: from the corpus's users (int32 [b], -1 for padding) to their local parameters
            (float32 [b, n]); None for those in `params`.
        """
        references, hypotheses, losses, count = [], [], 0.0, 0
        # Placed otherwise they would compile again.
        params = jax.device_put(params, model_sharding(self._mesh, params))
        for batch in eval_batches(corpus, self._buckets, self._batch_size, ARRAYS, owners=True):
            users = batch.pop("user")
            on_device = jax.device_put(batch, self._sharding)
            if rows is None:
                outputs = self._evaluate(params, on_device)
            else:
                own = jax.device_put(rows(users), self._sharding)
                outputs = self._evaluate_own(params, own, on_device)
            tokens, lengths, loss, valid = jax.device_get(outputs)
            losses += float(loss.sum())
            count += int(valid.sum())
            for i in np.flatnonzero(batch["mask"]):
                labels = batch["labels"][i, : batch["labels_length"][i]]
                references.append(self._tokenizer.decode(labels))
                hypotheses.append(self._tokenizer.decode(tokens[i, : lengths[i]]))
        return references, hypotheses, losses / max(count, 1)

    def __call__(
        self, params: Any, corpus: Corpus, rows: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> dict[str, float]:
        """{"wer": percent, "cer": percent, "loss": nats per utterance}; see `transcripts`.

        Of labels that are phonemes "wer" is the phoneme error rate, and "cer" says nothing.
        """
        references, hypotheses, loss = self.transcripts(params, corpus, rows)
        rates: tuple[ErrorRate, ErrorRate] = (
            word_errors(references, hypotheses),
            char_errors(references, hypotheses),
        )
        return {"wer": rates[0].percent, "cer": rates[1].percent, "loss": loss}
