"""A client as the cohort's sum maps it: an algorithm's, with local rows, scales and subsets."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedasr.federated.algorithms import Algorithm, sent
from fedasr.federated.client import ClientUpdate
from fedasr.federated.cohort import Weigh
from fedasr.federated.local import LocalUpdate, with_local
from fedasr.federated.subset import merge, select
from fedasr.privacy.adaptive import ClientView
from fedasr.privacy.mechanism import Mechanism


class ClientSide(NamedTuple):
    """Arguments of `fedasr.federated.cohort.make_cohort` of the same names."""

    client_update: ClientUpdate | LocalUpdate
    clip: optax.GradientTransformation
    weigh: Weigh | None


def client_side(mechanism: Mechanism, algorithm: Algorithm) -> ClientSide:
    """What each client of a round does, up to the clipped update.

    Args:
      mechanism: clips, and may send clients scales of their bounds beside the parameters.
      algorithm: trains.
    """
    update: Any = algorithm.client_update
    if algorithm.store is not None:
        update = with_local(update, algorithm.store.layout)
    if mechanism.adaptive is not None:
        update = _without_scales(update)
    shared, clip = sent(algorithm), mechanism.client_transform()
    clip = clip._replace(init=functools.partial(_init_part, clip.init, shared))
    return ClientSide(update, clip, _for_all(algorithm.weigh, shared))


def _init_part(init: Any, trained: Sequence[bool] | None, view: Any) -> Any:
    """The clipping's state for the trained variables of what clients get."""
    if isinstance(view, ClientView):
        return init(view._replace(params=select(view.params, trained)))
    return init(select(view, trained))


def _for_all(weigh: Weigh | None, trained: Sequence[bool] | None) -> Weigh | None:
    """`weigh` with zeros in its update for what is not trained."""
    if weigh is None or trained is None:
        return weigh

    def weigh_all(params, delta, batches, key):
        whole = merge(delta, jax.tree.map(jnp.zeros_like, params), trained)
        return weigh(params, whole, batches, key)

    return weigh_all


def _without_scales(client_update: Callable[..., Any]) -> Callable[..., Any]:
    """The same client update for a `ClientView`: local training knows nothing of bounds."""

    def update(view, *args, **kwargs):
        return client_update(view.params, *args, **kwargs)

    return update
