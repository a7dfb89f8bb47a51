"""The federated algorithm of a configuration, with its options."""

import math
import types
from typing import Any

import jax

from fedasr.errors import UserError
from fedasr.federated.algorithms import (
    Algorithm,
    Facts,
    extras_of,
    make_algorithm,
    sent_like,
)
from fedasr.federated.client import Loss
from fedasr.federated.extras import Sent, broadcast_of
from fedasr.federated.local import LocalStore
from fedasr.federated.subset import select
from fedasr.training.builders import clients, models, optimizers
from fedasr.training.config import Config

_NUMBER = 4  # bytes of a float32


def make(
    config: Config, loss: Loss, share: float, store: LocalStore | None, trained: Any
) -> Algorithm:
    """The algorithm that `config.algorithm` names.

    Args:
      config, loss: of the run.
      share: expected cohort over population.
      store: of what stays with users; None if nothing does.
      trained: see `models.trained_variables`.

    Raises:
      UserError: for options that it does not take.
    """
    client = config.client
    steps = client.steps or client.max_steps or client.epochs
    return make_algorithm(
        config.algorithm,
        clients.make_client_update(config, optimizers.local_update(config), loss),
        optimizers.server_optimizer(config),
        Facts(share=share, unit=max(client.learning_rate * max(steps, 1), 1e-6)),
        config.algorithm_options,
        trained=trained,
        store=store,
    )


def check(config: Config) -> None:
    """Raises UserError for an algorithm that the rest of the configuration does not go with."""
    if not config.has_rounds:
        if config.algorithm_options:
            raise UserError("algorithm_options are of federated algorithms: 'central' has none")
        return
    extras = extras_of(_without_data(config))
    if extras is None:
        return
    privacy = config.privacy
    if privacy.enabled and privacy.sigma and extras.unaccounted:
        raise UserError(extras.unaccounted)
    if privacy.enabled and privacy.noise == "skellam" and extras.message is not None:
        raise UserError(
            f"privacy.noise='skellam' has no room for what algorithm={config.algorithm!r} sends "
            "beside the model: choose privacy.noise='independent'"
        )
    if config.local.prototype != "init" and models.keeps_rows(config):
        raise UserError(
            f"local.prototype must be 'init': what algorithm={config.algorithm!r} remembers of a "
            "user begins empty"
        )


def _without_data(config: Config) -> Algorithm:
    """The algorithm, of a loss and a store that nobody may use."""
    layout: Any = models.local_layout(config)
    trained = models.trained_variables(config)
    store: Any = None if layout is None else types.SimpleNamespace(layout=layout)

    def loss(params, batch, key):
        raise NotImplementedError

    return make(config, loss, 1.0, store, trained)


def sent_shapes(config: Config, params: Any) -> Any:
    """Shapes of what a client sends: updates of shared variables, and what is beside them.

    Args:
      config: of the run. params: the model's, or their shapes.
    """
    algorithm = _without_data(config)
    if extras_of(algorithm) is None:
        return jax.eval_shape(lambda p: select(p, models.shared_variables(config)), params)
    return jax.eval_shape(lambda p: sent_like(algorithm, p), params)


def with_extras(config: Config, described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a client receives and sends, and once more with what the algorithm has beside it.

    Args:
      config: of the run.
      described: from `clients.describe_client`.
    """
    algorithm = _without_data(config)
    extras = extras_of(algorithm)
    if extras is None or (extras.message is None and not extras.broadcast):
        return described
    part = select(models.variable_shapes(config), algorithm.trained)
    state = jax.eval_shape(algorithm.server_optimizer.init, part)
    down = _numbers(broadcast_of(state)) if extras.broadcast else 0
    sent = jax.eval_shape(extras.sent_like, part)
    up = _numbers(sent.extra) if isinstance(sent, Sent) else 0
    last = described[-1]
    beside = {
        "method": f"{last['method']}; {config.algorithm}",
        "down_bytes": last["down_bytes"] + _NUMBER * down,
        "up_bytes": last["up_bytes"] + _NUMBER * up,
    }
    return [*described, {**last, **beside}]


def _numbers(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
