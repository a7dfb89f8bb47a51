"""Groups that train side by side, each with its own users, and become one model now and then.

Every group (accents, languages, devices, privacy regimes) has a server of its own. After so many
rounds the servers' models are fused, and all groups go on from the result. Privacy: a group's users
are protected by the mechanism of their group alone; what other groups do with its released models,
and the fusion itself, is post-processing. That takes noise and cohorts of their own: the
simulations' seeds must differ, or a difference of two groups' models has no noise. The utterances
that a search scores models on are not covered: they must be held out for it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError
from fedasr.federated.metrics import RoundMetrics
from fedasr.federated.server import ServerState
from fedasr.federated.simulation import Simulation
from fedasr.fusion import archive as archives
from fedasr.fusion.baselines import combine
from fedasr.fusion.methods import Method
from fedasr.streams import Stream, seed_key

PyTree = Any
# (models of the groups, rounds done) -> one model.
Fuse = Callable[[Sequence[PyTree], int], PyTree]


class Fused(NamedTuple):
    """After a fusion.

    round: rounds that every group has done. model: what all go on from. states: of the groups'
    servers; each keeps its optimiser's state. metrics: by group, of the rounds since the last
    fusion.
    """

    round: int
    model: PyTree
    states: list[ServerState]
    metrics: list[list[RoundMetrics]]


def average(models: Sequence[PyTree], round: int) -> PyTree:
    """The mean of the models.

    Args:
      models: of one structure. round: of no consequence.
    """
    del round
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    return combine(stacked, jnp.full(len(models), 1 / len(models)))


def by_search(method: Method, evaluations: int, seed: int = 0) -> Fuse:
    """Fuses by a method such as M2N2, from scratch every time.

    Args:
      method: its scores must be of data that no group trains on. evaluations: of a fusion, rounded
        up to whole steps. seed: with the round it decides all that is random.
    """
    steps = -(-evaluations // method.batch)

    @jax.jit
    def search(models, key):
        first, rest = jax.random.split(key)

        def body(i, state):
            return method.step(state, jax.random.fold_in(rest, i), i)

        state = jax.lax.fori_loop(0, steps, body, method.init(models, first))
        return method.best(state), method.lowest(state)

    def fuse(models, round):
        # Of the host: a model that lies on several devices would be searched for on each.
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *jax.device_get(list(models)))
        key = jax.random.fold_in(seed_key(seed, Stream.FUSION), round)
        model, lowest = search(stacked, key)
        archives.refuse_negative(lowest)
        return model

    return fuse


def train(
    simulations: Sequence[Simulation],
    states: Sequence[ServerState],
    rounds: int,
    every: int,
    fuse: Fuse,
) -> Iterator[Fused]:
    """Trains until every group has done `rounds` rounds; yields at every fusion, the end's too.

    The fusions are at fixed rounds, so a run that goes on from saved states ends as one that was
    not interrupted.

    Args:
      simulations: of the groups, with models of one structure. states: of their servers, after the
        same number of rounds. rounds: in all. every: rounds between fusions. fuse: see `by_search`.

    Raises:
      UserError: groups without a state, or states of different rounds; `every` below 1; groups with
        noise and the same root.
    """
    states = list(states)
    noisy = [
        np.asarray(state.root).tobytes()
        for simulation, state in zip(simulations, states, strict=False)
        if simulation.mechanism.noise_multiplier > 0
    ]
    if len(set(noisy)) < len(noisy):
        raise UserError(
            "groups with noise need different seeds or identities, or they all draw the same noise"
        )
    done = {int(state.round) for state in states}
    if len(states) != len(simulations) or len(done) != 1 or every < 1:
        raise UserError(
            f"{len(simulations)} groups need as many states, of one round (not {sorted(done)}), "
            f"and at least one round between fusions (not {every})"
        )
    (round,) = done
    while round < rounds:
        until = min(rounds, (round // every + 1) * every)
        metrics: list[list[RoundMetrics]] = [[] for _ in states]
        for group, simulation in enumerate(simulations):
            for states[group], reported in simulation.run(states[group], until - round):
                metrics[group].append(reported)
        round = until
        model = jax.device_get(fuse([state.params for state in states], round))
        states = [
            simulation.transfer(state._replace(params=model))
            for simulation, state in zip(simulations, states, strict=True)
        ]
        yield Fused(round, model, list(states), metrics)
