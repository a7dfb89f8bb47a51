"""Models of users who adapt the common one to some of their speech, before they are evaluated."""

import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
import optax

from fedasr.data.batching import Batching, make_buckets
from fedasr.data.corpus import Corpus
from fedasr.data.views import UserSubset
from fedasr.errors import UserError
from fedasr.federated.client import local_training
from fedasr.models.recogniser import ARRAYS, Recogniser
from fedasr.streams import Stream, seed_key
from fedasr.training.evaluation import Evaluator
from fedasr.training.metrics import ErrorRate, word_errors


def fine_tuned(
    recogniser: Recogniser,
    params: Any,
    corpus: Corpus,
    *,
    rate: float,
    epochs: int = 1,
    batch_size: int = 4,
    grad_clip: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[int, Any]]:
    """Each user's own model: plain SGD from the common one, on that user's speech alone.

    Args:
      recogniser: the model. params: the common one's.
      corpus: what each user adapts to.
      rate: learning rate. epochs: passes over it. batch_size: utterances in a batch.
      grad_clip: largest norm of a batch's gradient.
      seed: of the order and of dropout.

    Yields:
      (number of the user in `corpus`, parameters).
    """
    update = jax.jit(local_training(recogniser.loss, optax.sgd(rate), grad_clip=grad_clip))
    batching = Batching(batch_size, epochs=epochs, buckets=make_buckets([corpus]), select=ARRAYS)
    batcher = batching.batcher(corpus, 1, seed)
    key = seed_key(seed, Stream.FINE_TUNING)
    for user in range(len(corpus.users)):
        ((chunk, _),) = batcher.chunks([user], 0)
        own = jax.tree.map(lambda x: x[0], chunk.batches)
        delta, _ = update(params, own, chunk.num_steps[0], jax.random.fold_in(key, user))
        yield user, jax.tree.map(lambda w, d: w - d, params, delta)


def evaluate_fine_tuned(
    evaluator: Evaluator,
    recogniser: Recogniser,
    params: Any,
    adapted: Corpus,
    held_out: Corpus,
    **options: Any,
) -> dict[int, ErrorRate]:
    """Word errors of each user's own model on speech that it has not adapted to.

    Args:
      evaluator, recogniser, params: of the common model.
      adapted: what users adapt to. held_out: other utterances of the same users.
      options: see `fine_tuned`.

    Returns:
      By the user's number in `held_out`.

    Raises:
      UserError: a user has nothing to adapt to.
    """
    places = {str(name): i for i, name in enumerate(held_out.users)}
    if missing := sorted(places.keys() - {str(name) for name in adapted.users}):
        raise UserError(f"user {missing[0]!r} has no speech to adapt to in the other split")
    found = {}
    for user, own in fine_tuned(recogniser, params, adapted, **options):
        place = places.get(str(adapted.users[user]))
        if place is not None:
            alone = UserSubset(held_out, [place])
            decoded, _ = evaluator.decoded(own, alone)
            found[place] = word_errors(
                [x.reference for x in decoded], [x.hypothesis for x in decoded]
            )
    return dict(sorted(found.items()))


def distribution(rates: Collection[ErrorRate]) -> dict[str, float]:
    """How word error rates lie over users, each of whom counts once.

    Args:
      rates: of each user.

    Returns:
      "wer_user_mean", "wer_user_median" and "wer_user_worst" (mean of the tenth of the users, at
      least one, with the highest), in percent; "wer_user_interval", half the width of the mean's
      95% interval over users (normal), NaN for one user; {} for none.
    """
    if not rates:
        return {}
    percent = np.sort([rate.percent for rate in rates])
    worst = percent[-max(1, len(percent) // 10) :]
    spread = percent.std(ddof=1) if len(percent) > 1 else math.nan
    return {
        "wer_user_mean": float(percent.mean()),
        "wer_user_median": float(np.median(percent)),
        "wer_user_worst": float(worst.mean()),
        "wer_user_interval": float(1.96 * spread / math.sqrt(len(percent))),
    }
