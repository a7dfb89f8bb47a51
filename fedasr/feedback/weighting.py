"""Weighted client aggregation: how much a user's clipped update counts (arXiv 2408.10443).

Weights lie in [0, 1] and are applied after clipping, so that one user moves the sum of updates by
no more than without them. Two designs:

* `word_weights`: by the words that users hold, rare and fresh ones above all. Beside a user's own
  words they depend on a histogram over all users, which is published first and has noise and a
  privacy event of its own (`fedasr.feedback.histograms`, `Mechanism.released`).
* `quality_weight`: by what the update does to the loss on held-out data of the server, judged on
  the device. The precedent is arXiv 2104.14297; its weights are normalised over the clients of
  a round, which would let one client move the weights of all, so ours are not.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.data.corpus import Corpus
from fedasr.errors import UserError
from fedasr.federated.cohort import Weigh
from fedasr.feedback.histograms import Histogram
from fedasr.text import CharTokenizer


def words_of_users(corpus: Corpus, tokenizer: CharTokenizer) -> list[frozenset[str]]:
    """The words in each user's labels, by user."""
    return [
        frozenset(
            word
            for example in corpus.get(user, range(int(size)))
            for word in tokenizer.decode(example["labels"]).split()
        )
        for user, size in enumerate(corpus.sizes)
    ]


def word_weights(
    words: Sequence[Collection[str]],
    histogram: Histogram,
    server_counts: Mapping[str, int] | None = None,
    *,
    trusted: float = 2.0,
    power: float = 1.0,
    floor: float = 0.1,
) -> np.ndarray:
    """Users' weights by their rarest word that is common enough to be trusted.

    With n(w) the users who hold a word by the histogram, and s(w) how often the server's own data
    have it, its rarity is (trusted / (n + s))^power, at most 1; and 0 where n < trusted: what
    hardly anybody else says is as likely a mistake. A user has the weight
    floor + (1 - floor) * (largest rarity among the words).

    Args:
      words: of each user.
      histogram: of users by word.
      server_counts: occurrences of words in the server's data, which are no secret.
      trusted: users from which on a word counts, above 0. Where the histogram is noisy it should
        be some standard deviations of its noise above 1.
      power: how quickly the weight falls with the count, 0 or more.
      floor: weight of users who have nothing rare, in [0, 1].

    Returns:
      float32 [users], in [floor, 1].

    Raises:
      UserError: an argument out of range.
    """
    if not (trusted > 0 and power >= 0 and 0 <= floor <= 1):
        raise UserError(f"trusted={trusted}, power={power} or floor={floor} is out of range")
    server_counts = server_counts or {}

    def rarity(word: str) -> float:
        users = histogram.count(word)
        if users < trusted:
            return 0.0
        return (trusted / (users + server_counts.get(word, 0))) ** power

    known = {word: rarity(word) for word in sorted(set().union(*words))}
    most = np.asarray([max((known[word] for word in own), default=0.0) for own in words])
    # Rounded to float32 no weight may pass 1.
    return np.minimum(floor + (1 - floor) * most, 1.0).astype(np.float32)


def quality_weight(
    evaluate: Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]],
    held_out: Mapping[str, Any],
    *,
    temperature: float,
    step: float = 1.0,
) -> Weigh:
    """Weights by whether an update lowers or raises the loss on held-out data of the server.

    With L the mean loss on the held-out batch, the weight is
    sigmoid((L(params) - L(params - step * delta)) / temperature): 1/2 for an update that changes
    nothing, towards 1 for one that helps and towards 0 for one that harms.

    Args:
      evaluate: of a `fedasr.models.recogniser.Recogniser`, whose third and fourth results are the
        losses float [b] and whether they count, bool [b].
      held_out: one batch that every device gets; arrays as for `evaluate`.
      temperature: change of the loss (nats per utterance) that matters, above 0.
      step: the update is judged at so many times its length: clipped, it may be tiny.

    Raises:
      UserError: an argument out of range.
    """
    if not (temperature > 0 and step > 0):
        raise UserError(f"temperature={temperature} and step={step} must be above 0")

    def mean_loss(params):
        _, _, losses, valid = evaluate(params, held_out)
        return jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.maximum(jnp.sum(valid), 1)

    def weigh(params, delta, batches, key):
        del batches, key
        moved = jax.tree.map(lambda p, d: p - step * d.astype(p.dtype), params, delta)
        return jax.nn.sigmoid((mean_loss(params) - mean_loss(moved)) / temperature)

    return weigh
