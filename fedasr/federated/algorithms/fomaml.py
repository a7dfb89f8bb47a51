"""First-order MAML: the gradient after a few local steps, applied before (arXiv 1703.03400)."""

from collections.abc import Sequence
from typing import Any

import optax

from fedasr.federated import checks
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.client import CorrectedUpdate
from fedasr.federated.extras import Extras, zeros_like
from fedasr.federated.local import LocalStore


def FOMAML(
    client_update: CorrectedUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    trained: Sequence[bool] | None = None,
    store: LocalStore | None = None,
) -> FedAvg:
    """Clients train as ever, and send the gradient of their last batch, where they got by then.

    With one step it is FedSGD. The server's learning rate is that of gradients.

    Args:
      client_update: takes corrections (`fedasr.federated.client.local_training`).
      server_optimizer, trained: see `fedasr.federated.algorithms.Algorithm`.
      store: not used.

    Raises:
      UserError: for local training that takes no corrections.
    """
    checks.takes_corrections(client_update, "fomaml")

    def train(params, broadcast, memory, batches, num_steps, key, max_steps=None, round=0):
        last: Any = optax.GradientTransformation(zeros_like, lambda g, s, p=None: (g, g))
        _, metrics, gradient = client_update(
            params, batches, num_steps, key, max_steps, round, correction=last
        )
        return gradient, metrics, memory

    return FedAvg(client_update, server_optimizer, trained=trained, extras=Extras(train))
