"""Models of users who adapt the common one to some of their speech, before they are evaluated."""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from fedasr.data.batching import Batching, make_buckets
from fedasr.data.corpus import Corpus
from fedasr.data.views import UserSubset
from fedasr.errors import UserError
from fedasr.federated.client import local_training
from fedasr.models.recogniser import ARRAYS, Recogniser
from fedasr.streams import Stream, seed_key
from fedasr.training.evaluation import Decoded, Evaluator


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
) -> list[Decoded]:
    """What each user's own model makes of speech that it has not adapted to.

    Args:
      evaluator, recogniser, params: of the common model.
      adapted: what users adapt to. held_out: other utterances of the same users.
      options: see `fine_tuned`.

    Returns:
      Every utterance of `held_out` once.

    Raises:
      UserError: a user has nothing to adapt to.
    """
    places = {str(name): i for i, name in enumerate(held_out.users)}
    if missing := sorted(places.keys() - {str(name) for name in adapted.users}):
        raise UserError(f"user {missing[0]!r} has no speech to adapt to in the other split")
    found: list[Decoded] = []
    for user, own in fine_tuned(recogniser, params, adapted, **options):
        place = places.get(str(adapted.users[user]))
        if place is not None:
            decoded, _ = evaluator.decoded(own, UserSubset(held_out, [place]))
            found += (one._replace(user=place) for one in decoded)
    return found
