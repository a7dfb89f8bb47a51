"""What a federated algorithm is, and those that there are.

A new one is a file in this folder and a line in `ALGORITHMS`. See `Algorithm` for its parts.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import optax

from fedasr.errors import UserError
from fedasr.federated.client import ClientUpdate
from fedasr.federated.cohort import Weigh
from fedasr.federated.local import LocalStore

# name: "module:function or class", called as
# make(client_update, server_optimizer, *, trained=None, store=None), see `Algorithm`. These names
# are what the setting `algorithm` may be, beside "central".
ALGORITHMS = {
    "federated": "fedasr.federated.algorithms.fedavg:FedAvg",
}


@runtime_checkable
class Algorithm(Protocol):
    """What clients do with the parameters they get, and the server with what they send.

    The mechanism stands between the two, whatever the algorithm: all that clients send is one
    update (a tree), which is clipped, weighted, summed and noised. So an algorithm needs no
    argument about privacy of its own, and where its state lives says what is said about users:

    * What the server sends beside the model, and clients answer (SCAFFOLD's control variate), is
      variables of the parameters that `Simulation.init` is given.
    * What the server alone remembers (momenta, buffered updates) is the optimiser's state.
    * What a client alone remembers between rounds is local variables of the parameters: a row of
      the store. Never sent, nor seen by anybody else.
    """

    @property
    def client_update(self) -> ClientUpdate:
        """Local training, from the parameters to a delta (old minus new) of what is trained."""

    @property
    def server_optimizer(self) -> optax.GradientTransformation:
        """The server's step: any optax transformation; it sees the noisy mean of clients' deltas.

        Its state is part of checkpoints.
        """

    @property
    def trained(self) -> Sequence[bool] | None:
        """For each variable in order, whether `client_update` trains it; None for all.

        Its deltas then hold these variables only (see `fedasr.federated.subset`). The rest get no
        clipping bound, no noise and no optimiser state, and stay as they are.
        """

    @property
    def store(self) -> LocalStore | None:
        """The users' local parameters, which `client_update` trains with the rest; None for none.

        Its layout must know `trained`, and its round be the state's: `store.restore` makes it so.
        """

    @property
    def weights(self) -> Sequence[float] | np.ndarray | None:
        """Of the users, in [0, 1], [users], for a mechanism whose weighting is "bounded".

        A user's own may depend on their data and on what is public or private by itself (such as a
        noisy histogram), not otherwise on another user's data. The server divides by the expected
        cohort all the same, so that small weights are small steps.
        """

    @property
    def weigh(self) -> Weigh | None:
        """Weights that devices decide in every round, likewise; both given, they multiply."""


def sent(algorithm: Algorithm) -> Sequence[bool] | None:
    """For each variable in order, whether clients send an update of it; None for all."""
    return algorithm.trained if algorithm.store is None else algorithm.store.layout.shared


def algorithm_by_name(name: str) -> Callable[..., Algorithm]:
    """What makes an algorithm of `ALGORITHMS`.

    Raises:
      UserError: for an unknown name.
    """
    if name not in ALGORITHMS:
        raise UserError(f"unknown algorithm {name!r}: choose one of {', '.join(ALGORITHMS)}")
    module, attribute = ALGORITHMS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
