"""Merging speech recognisers: trained models in, scores of utterances out.

An utterance's score is exp(-loss / characters), the (geometric) mean probability of a character of
its transcript. It lies in [0, 1], needs no decoding, and tells a slightly better model from a
slightly worse one, which a word error rate of a few words does not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.data.batching import eval_batches, make_buckets
from fedasr.data.corpus import Corpus
from fedasr.data.records import open_corpus, read_metadata
from fedasr.errors import UserError
from fedasr.models.recogniser import INPUTS, Recogniser, takes_audio
from fedasr.privacy import ledger
from fedasr.text import Tokenizer
from fedasr.training.builders.corpora import fitting_tokenizer
from fedasr.training.builders.models import build_recogniser
from fedasr.training.checkpoint import Checkpointer, restore_params
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.evaluation import Evaluator, evaluation_buckets
from fedasr.training.workdir import recorded_config

PyTree = Any
_MULTIPLES = {"features": 24, "labels": 4}


class Parents(NamedTuple):
    """Recognisers of one architecture.

    params: side by side, leaves [parents, ...], on the host. recogniser: their functions. metadata:
    of the first checkpoint. tokenizer: of the data that they are merged on. ledgers: of each
    checkpoint, None where it has none.
    """

    params: PyTree
    recogniser: Recogniser
    metadata: Mapping[str, Any]
    tokenizer: Tokenizer
    ledgers: Sequence[Mapping[str, Any] | None] = ()

    @property
    def audio(self) -> bool:
        """Whether they hear audio."""
        return takes_audio(self.metadata["config"]["model"]["name"])

    def model(self, number: int) -> PyTree:
        """One parent's parameters."""
        return jax.tree.map(lambda x: x[number], self.params)


def load_parents(paths: Sequence[str | Path], data: str | Path) -> Parents:
    """Reads trained recognisers.

    Args:
      paths: work directories of `fedasr train`, or checkpoints. data: a prepared corpus.

    Raises:
      UserError: fewer than two, models that differ in shape or in what they write, or in which
        users have variables of their own.
    """
    if len(paths) < 2:
        raise UserError("merging needs two models or more")
    metadata = [checkpoint_metadata(path) for path in paths]
    configs = [recorded_config(one["config"]) for one in metadata]
    for path, config in zip(paths, configs, strict=True):
        if config.local.patterns:
            raise UserError(f"{path}: users have variables of their own, no model is everybody's")
    corpus = read_metadata(data)
    tokenizers = [fitting_tokenizer(config, corpus) for config in configs]
    for path, other in zip(paths[1:], configs[1:], strict=True):
        if other.model != configs[0].model:
            raise UserError(f"{path} is another model than {paths[0]}: they cannot be merged")
    models = [restore_params(path) for path in paths]
    params = jax.tree.map(lambda *x: np.stack(x), *models)
    recogniser = build_recogniser(configs[0], augmented=False)
    ledgers = [one.get("ledger") for one in metadata]
    return Parents(params, recogniser, metadata[0], tokenizers[0], ledgers)


def utterance_scores(recogniser: Recogniser, corpus: Corpus, batch_size: int = 32) -> Any:
    """`score` of a corpus for `fedasr.fusion.methods`: float32 [utterances].

    All features are put on the default device; utterances are scored `batch_size` at a time. One
    whose transcript cannot be aligned with its frames scores 0.

    Args:
      recogniser: of the models. corpus: to score on. batch_size: utterances at a time.
    """
    buckets = make_buckets([corpus], 1, _MULTIPLES)
    batches = list(eval_batches(corpus, buckets, batch_size, INPUTS))
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *batches)
    real = np.flatnonzero(np.concatenate([batch["mask"] for batch in batches]))

    def of_batch(params, batch):
        _, _, loss, valid = recogniser.evaluate(params, batch)
        return jnp.where(valid, jnp.exp(-loss / jnp.maximum(batch["labels_length"], 1)), 0.0)

    def score(params):
        return jax.lax.map(lambda batch: of_batch(params, batch), stacked).reshape(-1)[real]

    return score


def error_rates(parents: Parents, data: str | Path, splits: Sequence[str]) -> Any:
    """A function from a model to {split: word error rate in percent}.

    Args:
      parents: for their functions. data: a prepared corpus. splits: split expressions of it.
    """
    corpora = {split: open_corpus(data, split, parents.audio) for split in splits}
    buckets = evaluation_buckets(list(corpora.values()))
    evaluator = Evaluator(parents.recogniser, buckets, tokenizer=parents.tokenizer)

    def rates(params: PyTree) -> dict[str, float]:
        return {split: evaluator(params, corpus)["wer"] for split, corpus in corpora.items()}

    return rates


def fused_ledger(parents: Parents, evaluations: int, searched: Sequence[str]) -> dict[str, Any]:
    """What users have been charged for a merged model: all that its parents were, and the search.

    The search looks at its users' speech without noise: for them it is infinite.

    Args:
      parents: with their ledgers. evaluations: of the search. searched: ids of its users.
    """
    earlier: dict[tuple[str, str], Any] = {}
    for one in parents.ledgers:
        for entry in () if one is None else (*one["earlier"], *one["own"]):
            # Parents may share a seed, or be of one run.
            known = earlier.setdefault((entry["run"], entry["stage"]), entry)
            if entry["rounds"] > known["rounds"]:
                earlier[entry["run"], entry["stage"]] = entry
    search = ledger.without_privacy("fused", "search", evaluations, ledger.Users.of(searched))
    whole = all(one is not None and one["known"] for one in parents.ledgers)
    return {
        "known": whole and bool(parents.ledgers),
        "earlier": list(earlier.values()),
        "own": ledger.to_data([search]),
    }


def save_fused(
    parents: Parents,
    params: PyTree,
    evaluations: int,
    workdir: str | Path,
    searched: Sequence[str],
) -> Path:
    """Writes a merged model as a checkpoint that `fedasr evaluate` and `init_from` read.

    Args:
      parents: for the configuration. params: the model. evaluations: that found it. workdir: new,
        or of the same run. searched: ids of the users on whose speech it was searched for.
    """
    with Checkpointer(Path(workdir) / "checkpoints", keep=1) as checkpointer:
        metadata = {**parents.metadata, "stage": "fused", "units": evaluations}
        metadata["ledger"] = fused_ledger(parents, evaluations, searched)
        checkpointer.save(evaluations, {"params": params}, metadata)
    return Path(workdir)
