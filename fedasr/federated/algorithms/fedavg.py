"""Federated averaging, with any optimisers on either side (arXiv 1602.05629, 2003.00295)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import optax

from fedasr.federated import checks
from fedasr.federated.client import ClientUpdate
from fedasr.federated.cohort import Weigh
from fedasr.federated.extras import Extras
from fedasr.federated.local import LocalStore
from fedasr.federated.participation import Participation


@dataclasses.dataclass(frozen=True)
class FedAvg:
    """Clients train alone, the server steps by the mean of their deltas.

    Attributes:
      client_update: local training, such as `local_training(loss, optax.sgd(0.1))`.
      server_optimizer: any optax transformation; `optax.sgd(1.0)` is the mean itself.
      trained, store, weights, weigh, extras, participation: see
        `fedasr.federated.algorithms.Algorithm`.

    Raises:
      UserError: for a store that knows of other trained variables, or one together with `weigh`.
    """

    client_update: ClientUpdate
    server_optimizer: optax.GradientTransformation
    trained: Sequence[bool] | None = dataclasses.field(default=None, kw_only=True)
    store: LocalStore | None = dataclasses.field(default=None, kw_only=True)
    weights: Sequence[float] | np.ndarray | None = dataclasses.field(
        default=None, kw_only=True, compare=False
    )
    weigh: Weigh | None = dataclasses.field(default=None, kw_only=True)
    extras: Extras | None = dataclasses.field(default=None, kw_only=True)
    participation: Participation | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        checks.weigh_sees_the_whole_model(self)
        checks.store_knows_what_is_trained(self)
