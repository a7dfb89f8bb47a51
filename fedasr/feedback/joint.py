"""Federated rounds mixed with central steps on the server's data, and averages of checkpoints.

Both hold a recogniser back from forgetting what the users of the moment do not say (arXiv
2408.10443, 2310.00141). Central steps see the server's own data alone: to the users' privacy they
are post-processing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax

from fedasr.errors import UserError
from fedasr.federated.client import Params
from fedasr.federated.metrics import RoundMetrics
from fedasr.federated.server import ServerState
from fedasr.federated.simulation import Simulation
from fedasr.training.central import CentralTraining
from fedasr.training.checkpoint import restore_params


class JointState(NamedTuple):
    """params: the model. server, central: state of either optimiser. round, step: int32, done.

    root: of the federated rounds, see `fedasr.federated.server.ServerState`.
    """

    params: Params
    server: optax.OptState
    central: optax.OptState
    round: jax.Array
    step: jax.Array
    root: Any


class JointTraining:
    """Federated rounds, some central steps after each.

    Each has an optimiser with a state of its own. What happens in a round depends on the state
    alone, with the seeds of the two, so that a restored state goes on as it would have.

    Args:
      simulation: the federated rounds.
      central: the steps on the server's data.
      steps: central steps after every round.
    """

    def __init__(self, simulation: Simulation, central: CentralTraining, steps: int) -> None:
        if steps < 1:
            raise UserError(f"joint training needs at least 1 central step a round, not {steps}")
        self._simulation, self._central, self._steps = simulation, central, steps

    def init(self, params: Params) -> JointState:
        """The state before the first round."""
        server, central = self._simulation.init(params), self._central.init(params)
        return JointState(
            server.params,
            server.opt_state,
            central.opt_state,
            server.round,
            central.round,
            server.root,
        )

    def transfer(self, state: JointState) -> JointState:
        """Puts a state, such as a restored one, on every device."""
        placed: Any = state  # it takes any state of arrays
        return cast(JointState, self._simulation.transfer(placed))

    def run(self, state: JointState, rounds: int) -> Iterator[tuple[JointState, RoundMetrics]]:
        """Trains, yielding the state and the federated round's metrics after each round."""
        for _ in range(rounds):
            server = ServerState(state.params, state.server, state.round, state.root)
            ((server, metrics),) = self._simulation.run(server, 1)
            central = ServerState(server.params, state.central, state.step)
            *_, (central, _, _) = self._central.run(central, self._steps)
            state = JointState(
                central.params,
                server.opt_state,
                central.opt_state,
                server.round,
                central.round,
                server.root,
            )
            yield state, metrics


def average_params(trees: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """The weighted mean of parameters, leaf by leaf, added up in float64.

    Of the last rounds' it is a quieter model than the last alone; of an old model's and a new
    one's it trades what is learned for what is kept. (A running mean is
    `optax.incremental_update`.)

    Args:
      trees: pytrees of floating-point arrays, of one structure.
      weights: one of each, not negative; None for equal ones.

    Returns:
      numpy arrays of the first tree's dtypes.

    Raises:
      UserError: no tree, or weights that are not theirs.
    """
    given = np.ones(len(trees)) if weights is None else np.asarray(weights, np.float64)
    if not trees or given.shape != (len(trees),) or (given < 0).any() or not given.sum() > 0:
        raise UserError(f"{len(trees)} models cannot be averaged with the weights {given}")
    shares = given / given.sum()

    def mean(*leaves):
        total = sum(s * np.asarray(x, np.float64) for s, x in zip(shares, leaves, strict=True))
        return np.asarray(total).astype(np.asarray(leaves[0]).dtype)

    return jax.tree.map(mean, *jax.device_get(list(trees)))


def average_checkpoints(workdir: str | Path, last: int) -> Params:
    """The mean of the parameters of a run's last checkpoints (see `checkpoint.keep`).

    Args:
      workdir: a work directory of `fedasr train`, or its checkpoints folder.
      last: how many.

    Returns:
      Nested dicts of numpy arrays, as `fedasr.training.checkpoint.restore_params` gives them.

    Raises:
      UserError: there are not so many, or one cannot be read.
    """
    folder = Path(workdir)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    names = [f.name for f in folder.iterdir() if f.name.isdecimal()] if folder.is_dir() else []
    steps = sorted(names, key=int)
    if not 1 <= last <= len(steps):
        raise UserError(f"{folder} holds {len(steps)} checkpoints: {last} cannot be averaged")
    return average_params([restore_params(folder / step) for step in steps[-last:]])
