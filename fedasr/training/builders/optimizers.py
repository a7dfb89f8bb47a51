"""Optimisers of clients, server and central training, and their learning rates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedasr.errors import UserError, pass_exhaustion
from fedasr.federated.client import ClientUpdate, Loss, local_training
from fedasr.federated.server import constant_then_exponential, make_optimizer
from fedasr.training.config import Config
from fedasr.training.sections import NEVER, Central

# (least, most) of what optax's optimisers take; what is not here has to be 0 or more.
_OPTION_RANGES = {"eta": (0, 1e3), "trust_coefficient": (0, 1e3), "eps": (0, 1.0)}
_BELOW_ONE = ("b1", "b2", "momentum", "decay", "nu")


def check(config: Config) -> None:
    """Raises UserError for an optimiser that is unknown or does not take its options' values."""
    for section in ("seed_training", "central", "client", "server"):
        settings = getattr(config, section)
        options = getattr(settings, "options", {})
        _check_optimizer(settings.optimizer, options, f"{section}.options")
    for section in ("seed_training", "central"):
        settings = getattr(config, section)
        if settings.decay_linear and (settings.decay_smooth or not settings.decay_steps):
            raise UserError(
                f"{section}.decay_linear falls to 0 in {section}.decay_steps steps: set these, and "
                "no decay_smooth"
            )


def _check_optimizer(name: str, options: Mapping[str, Any], where: str) -> None:
    for option, value in options.items():
        least, most = _OPTION_RANGES.get(option, (0, 1e6))
        if isinstance(value, bool | str):
            continue
        if not least <= value <= most or (option in _BELOW_ONE and value >= 1):
            most_text = "below 1" if option in _BELOW_ONE else f"at most {most:g}"
            raise UserError(f"{where}.{option}={value} must be at least {least} and {most_text}")
    # Some options show what they are good for only when the optimiser is used.
    try:
        optimizer = make_optimizer(name, 0.1, **options)

        def once(x):
            return optimizer.update(x, optimizer.init(x), x)

        jax.eval_shape(once, {"x": jax.ShapeDtypeStruct((2, 2), "float32")})
    except UserError:
        raise
    except Exception as error:
        pass_exhaustion(error, f"trying {where}")
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: {name!r} does not take {dict(options)}: {reason}") from error


def server_optimizer(config: Config) -> optax.GradientTransformation:
    """The server's, whose learning rate follows the rounds."""
    server = config.server
    schedule = constant_then_exponential(
        server.learning_rate,
        server.decay_start,
        server.decay_rounds,
        server.decay_rate,
    )
    return make_optimizer(server.optimizer, schedule, **server.options)


def local_update(config: Config) -> Callable[[Loss], ClientUpdate]:
    """From a loss to a client's local training."""
    client = config.client
    # Whatever the number of rounds: a run that is extended has computed the same from the start.
    decays = client.decay_start < NEVER
    factor = constant_then_exponential(
        1.0, client.decay_start, client.decay_rounds, client.decay_rate
    )

    def make_update(loss: Loss) -> ClientUpdate:
        return local_training(
            loss,
            make_optimizer(client.optimizer, client.learning_rate),
            grad_clip=client.grad_clip,
            proximal=client.proximal,
            schedule=factor if decays else None,
            batch_keys=config.model.options.get("layer_drop_per") == "batch",
        )

    return make_update


def central_optimizer(settings: Central) -> optax.GradientTransformation:
    """Of the seed's section of a configuration, or the central baseline's."""
    return optax.chain(
        optax.clip_by_global_norm(settings.grad_clip),
        make_optimizer(settings.optimizer, central_schedule(settings), **settings.options),
    )


def central_schedule(settings: Central) -> float | optax.Schedule:
    """The learning rate by the number of steps done; a number where it is constant.

    Constant for `decay_start` steps. Then times `decay_rate` at once and again every `decay_steps`,
    or smoothly: times decay_rate^((steps - decay_start) / decay_steps). Or linearly: times
    1 - (steps - decay_start) / decay_steps, until it is 0.
    """
    rate, start, every = settings.learning_rate, settings.decay_start, settings.decay_steps
    if not every:
        return rate
    if settings.decay_linear:
        return optax.linear_schedule(rate, 0.0, every, start)
    if settings.decay_smooth:
        return constant_then_exponential(rate, start, every, settings.decay_rate)
    if not start:
        return optax.exponential_decay(rate, every, settings.decay_rate, staircase=True)

    def halving(count: jax.Array) -> jax.Array:
        decays = jnp.maximum((count - start) // every + 1, 0)
        return rate * settings.decay_rate ** decays.astype(jnp.float32)

    return halving
