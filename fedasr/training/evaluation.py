"""Word and character error rates of a recogniser over a corpus."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedasr.audio.features import LogMelConfig, num_frames
from fedasr.data.batching import Bucket, eval_batches, fewest_buckets
from fedasr.data.corpus import Corpus
from fedasr.decoding.registry import Decoder
from fedasr.errors import UserError
from fedasr.federated.cohort import AXIS, client_mesh, client_sharding, model_sharding
from fedasr.federated.local import Layout
from fedasr.models.recogniser import INPUTS, Recogniser
from fedasr.text import CharTokenizer, Tokenizer, tokenizer_for
from fedasr.training.metrics import (
    ErrorRate,
    char_errors,
    published_word_error_rate,
    word_errors,
)

MULTIPLES = {"features": 24, "labels": 4}  # of padded lengths; the features' comes first
# Frames of a batch: long utterances come few at a time, the longest alone. 5.5 minutes.
BATCH_FRAMES = 1 << 15
_PADDING, _MOST_BUCKETS = 0.3, 6
PUBLISHED_SECONDS = 30.0  # longer utterances are left out of the published rate
_PUBLISHED_FRAMES = num_frames(round(PUBLISHED_SECONDS * LogMelConfig().sample_rate))


def evaluation_buckets(
    corpora: Sequence[Corpus], multiples: Mapping[str, int] = MULTIPLES
) -> tuple[dict[str, int], ...]:
    """Buckets for an `Evaluator`: few, for each is compiled, but a long recording has its own."""
    return fewest_buckets(corpora, _PADDING, _MOST_BUCKETS, multiples)


class Decoded(NamedTuple):
    """An utterance as it was decoded.

    user: index of whose it is in the corpus. number: of it among the user's. reference, hypothesis:
    what was said, and what was found. frames: of the features.
    """

    user: int
    number: int
    reference: str
    hypothesis: str
    frames: int


class Evaluator:
    """Decodes every utterance of a corpus, in batches of one compiled shape a bucket.

    Memory is bounded by `BATCH_FRAMES` or by the longest utterance, whichever is more, not by their
    number: an utterance too long to come once for each device is computed on one.

    Args:
      recogniser: the model.
      buckets: padded shapes; every utterance must fit in one.
      batch_size: utterances at a time, rounded up to a multiple of the devices; fewer where they
        are long.
      devices: of this process; default all.
      tokenizer: that wrote the labels; default that of the 29 characters.
      layout: of local parameters, to evaluate users with their own.
      model_devices: devices that hold the model together, see `client_mesh`.
      published: whether "wer_published" is reported, too (see `published_word_error_rate`), of
        utterances of at most 30 s.
      decoder: of the scores, on the host; None for greedy decoding on the devices.

    Raises:
      UserError: a decoder for a model that has no scores of tokens in each frame.
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
        published: bool = False,
        decoder: Decoder | None = None,
    ) -> None:
        self._published = published
        compute: Any = recogniser.evaluate if decoder is None else recogniser.scores
        if compute is None:
            raise UserError(
                "this model has no scores that a beam could search (no CTC): choose the "
                "decoder 'greedy'"
            )
        self._decoder = decoder
        self._mesh = client_mesh(devices or jax.local_devices(), model_devices)
        lanes = self._mesh.shape[AXIS]
        self._one = client_mesh((devices or jax.local_devices())[:model_devices], model_devices)
        self._buckets = tuple(buckets)
        self._sizes = []
        for bucket in self._buckets or ({},):
            fitting = BATCH_FRAMES // max(next(iter(bucket.values()), 1), 1)
            whole = min(-(-batch_size // lanes), fitting // lanes) * lanes
            self._sizes.append(whole or max(1, min(batch_size, fitting)))
        self._evaluate: Any = jax.jit(compute)
        self._tokenizer = tokenizer or CharTokenizer()

        def one(params, row, example):
            batch = jax.tree.map(lambda x: x[None], example)
            outputs = compute(layout.insert(params, row), batch)
            return jax.tree.map(lambda x: x[0], outputs)

        self._evaluate_local: Any = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))

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
        decoded, loss = self.decoded(params, corpus, rows)
        return [x.reference for x in decoded], [x.hypothesis for x in decoded], loss

    def decoded(
        self, params: Any, corpus: Corpus, rows: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> tuple[list[Decoded], float]:
        """Every utterance once, and the mean loss of alignable ones; see `transcripts`."""
        found_all: list[Decoded] = []
        losses, count = 0.0, 0
        placed: dict[Any, Any] = {}
        for batch in eval_batches(corpus, self._buckets, self._sizes, INPUTS, owners=True):
            users, indices = batch.pop("user"), batch.pop("index")
            mesh = self._one if len(users) % self._mesh.shape[AXIS] else self._mesh
            if mesh not in placed:  # placed otherwise they would compile again
                placed[mesh] = jax.device_put(params, model_sharding(mesh, params))
            sharding = client_sharding(mesh)
            on_device = jax.device_put(batch, sharding)
            if rows is None:
                outputs = self._evaluate(placed[mesh], on_device)
            else:
                local_rows = jax.device_put(rows(users), sharding)
                outputs = self._evaluate_local(placed[mesh], local_rows, on_device)
            found, lengths, loss, valid = jax.device_get(outputs)
            losses += float(loss.sum())
            count += int(valid.sum())
            for i in np.flatnonzero(batch["mask"]):
                labels = batch["labels"][i, : batch["labels_length"][i]]
                decode = self._decoder or self._tokenizer.decode
                found_all.append(
                    Decoded(
                        int(users[i]),
                        int(indices[i]),
                        self._tokenizer.decode(labels),
                        decode(found[i, : lengths[i]]),
                        int(batch["features_length"][i]),
                    )
                )
        return found_all, losses / max(count, 1)

    def compilations(self) -> int:
        """How many programs were compiled: one for each bucket."""
        return self._evaluate._cache_size() + self._evaluate_local._cache_size()

    def __call__(
        self, params: Any, corpus: Corpus, rows: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> dict[str, float]:
        """{"wer": percent, "cer": percent, "loss": nats per utterance}; see `transcripts`.

        "wer" is that of the corpus: all its word errors over all its words. Of labels that are
        phonemes it is the phoneme error rate, and "cer" says nothing.
        """
        return self.rates(*self.decoded(params, corpus, rows))

    def rates(self, decoded: Sequence[Decoded], loss: float) -> dict[str, float]:
        """The rates of what `decoded` returns; see `__call__`."""
        references = [x.reference for x in decoded]
        hypotheses = [x.hypothesis for x in decoded]
        rates: tuple[ErrorRate, ErrorRate] = (
            word_errors(references, hypotheses),
            char_errors(references, hypotheses),
        )
        found = {"wer": rates[0].percent, "cer": rates[1].percent, "loss": loss}
        if self._published:
            kept = [x for x in decoded if x.frames <= _PUBLISHED_FRAMES]
            found["wer_published"] = published_word_error_rate(
                [x.reference for x in kept], [x.hypothesis for x in kept]
            )
        return found


def evaluate(
    recogniser: Recogniser,
    params: Any,
    corpus: Corpus,
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
    decoder: Decoder | None = None,
) -> dict[str, float]:
    """Error rates of a recogniser on a corpus.

    Compiles anew in every call: to evaluate again and again keep an `Evaluator`.

    Args:
      recogniser: the model.
      params: its parameters.
      corpus: of speech, with "features" and "labels".
      tokenizer: that wrote the labels. None for the one that the corpus names in its `metadata`
        or, where it has none, that of the 29 characters.
      batch_size, decoder: see `Evaluator`.

    Returns:
      {"wer": percent, "cer": percent, "loss": nats per utterance}; see `Evaluator`.
    """
    if tokenizer is None and hasattr(corpus, "metadata"):
        tokenizer = tokenizer_for(corpus.metadata)
    buckets = evaluation_buckets([corpus])
    evaluator = Evaluator(recogniser, buckets, batch_size, tokenizer=tokenizer, decoder=decoder)
    return evaluator(params, corpus)
