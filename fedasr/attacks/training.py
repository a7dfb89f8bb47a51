"""Short trainings that an attack observes: the run's rounds, from its model, over chosen users."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedasr.attacks.bounds import accuracy_at_most, at_most
from fedasr.attacks.matching import DELTA
from fedasr.attacks.results import Result, clopper_pearson
from fedasr.attacks.roll_call import RollCall
from fedasr.attacks.target import Settings, Target
from fedasr.data.corpus import InMemoryCorpus
from fedasr.models.recogniser import ARRAYS
from fedasr.streams import make_root
from fedasr.training.builders import optimizers

Users = dict[str, list[Any]]


def multipliers(settings: Settings) -> list[tuple[str, float | None]]:
    """(setting, noise multiplier): as they are, and clipped with each amount of noise."""
    found: list[tuple[str, float | None]] = [("as they are", None)]
    for z in settings.noise:
        found.append(("clipped", 0.0) if not z else (f"noise {z:.3g}", z))
    return found


def trained(
    target: Target,
    settings: Settings,
    name: str,
    users: Users,
    presence: np.ndarray,
    z: float | None,
) -> list[Any]:
    """Parameters after each of several trainings by users who are there or not.

    Args:
      target: of whose model, clients, server and clipping they are.
      settings: for the number of rounds.
      name: of the attack; its trainings have noise of their own.
      users: examples of each, by id.
      presence: bool [trainings, users], in the order of the ids; the server divides by how many
        there are on average.
      z: noise multiplier; None for no clipping.

    Returns:
      On the host, one for each training.
    """
    corpus = InMemoryCorpus(users, ragged=ARRAYS)
    sampler = RollCall(presence, settings.rounds, float(presence.sum(1).mean()))
    mechanism = target.mechanism(sampler, z)
    server = optimizers.server_optimizer(target.config)
    simulation = target.simulation(corpus, mechanism, server, "training")
    found = []
    for trial in range(len(presence)):
        root = make_root("attack", name, settings.seed, trial, str(z))
        state = simulation.init(target.params, root)
        state = state._replace(round=state.round + trial * settings.rounds)
        for after, _ in simulation.run(state, settings.rounds):
            state = after
        found.append(jax.device_get(state.params))
    return found


def training_result(
    target: Target,
    settings: Settings,
    name: str,
    setting: tuple[str, float | None],
    right: Sequence[bool] | np.ndarray,
    chance: float | None,
    what: str,
) -> Result:
    """From who was guessed right to a result; `chance` None for coins that decide who is there."""
    said, z = setting
    hits, count = int(np.sum(right)), int(np.size(right))
    sampler = RollCall(np.ones((1, 1), bool), settings.rounds, 1.0)
    mechanism = target.mechanism(sampler, z)
    if chance is None:
        chance, bound = 0.5, accuracy_at_most(mechanism, settings.rounds)
    else:
        bound = at_most(mechanism, settings.rounds, chance)
    return Result(
        attack=name,
        setting=said,
        success=hits / count,
        targets=count,
        interval=clopper_pearson(hits, count),
        chance=chance,
        bound=bound,
        noise_multiplier=z,
        epsilon=mechanism.epsilon(settings.rounds, DELTA).epsilon if z else None,
        delta=DELTA if z else None,
        what=what,
    )
