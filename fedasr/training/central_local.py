"""Central training in which every user has local parameters of their own, one user a batch.

So decoders of neural recordings are trained as published: a recording day is a user, its input
layer is local, the rest is shared by all days.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.data.batching import Padding, UserBatcher, fewest_buckets
from fedasr.data.corpus import Corpus
from fedasr.federated import hosts
from fedasr.federated.client import Loss, Params
from fedasr.federated.cohort import AXIS, client_mesh, model_sharding, replicated
from fedasr.federated.local import Layout
from fedasr.federated.server import ServerState
from fedasr.federated.subset import merge, select
from fedasr.streams import Stream, seed_key
from fedasr.training.central import MOST_BUCKETS, PADDING, compiled_step, run_steps


class LocalCentralTraining:
    """As `CentralTraining`, but a batch is of one user, whose row is trained with what is shared.

    A state's `params` are the model's, whose local variables stay as they were: what users without
    a row start from. Its `opt_state` is (the optimiser's, the users' rows float32 [users, size]).
    The optimiser sees the rows as one variable; in a step the gradient of all but one is zero.

    Args:
      corpus, loss, optimizer, batch_size, seed, multiples, steps_per_report, devices, select,
        stream: see `CentralTraining`.
      layout: which variables are local.
    """

    def __init__(
        self,
        corpus: Corpus,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        layout: Layout,
        batch_size: int,
        *,
        seed: int,
        multiples: Mapping[str, int] | None = None,
        steps_per_report: int = 10,
        devices: Sequence[jax.Device] | None = None,
        select: Sequence[str] | None = None,
        stream: Stream = Stream.CENTRAL,
    ) -> None:
        self._mesh = client_mesh(devices or jax.local_devices(), 1)
        self._batcher = UserBatcher(
            corpus,
            fewest_buckets([corpus], PADDING, MOST_BUCKETS, multiples),
            seed,
            batch_size=batch_size,
            multiple=self._mesh.shape[AXIS],
            select=select,
            stream=stream,
        )
        self._layout, self._optimizer, self._per_report = layout, optimizer, steps_per_report
        self._users = len(corpus.users)
        self._root = hosts.transfer_key(seed_key(seed, stream), replicated(self._mesh))
        self._step: Any = compiled_step(local_step(loss, optimizer, layout), self._mesh)

    def padding(self, steps: int) -> Padding:
        """How much of the first `steps` batches is real; see `UserBatcher.padding`."""
        return self._batcher.padding(steps)

    def compilations(self) -> int:
        """How many programs were compiled: at most one for each bucket."""
        return self._step._cache_size()

    def init(self, params: Params) -> ServerState:
        """The state before the first step: every user's row is as the parameters have it."""
        row = self._layout.extract(params)
        rows = jnp.broadcast_to(row, (self._users, *row.shape))
        opt_state = self._optimizer.init(_trained(params, rows, self._layout))
        return self.transfer(ServerState(params, (opt_state, rows), jnp.int32(0)))

    def transfer(self, state: ServerState) -> ServerState:
        """Puts a state, such as a restored one, on every device."""
        return hosts.transfer(state, model_sharding(self._mesh, state))

    def rows(self, state: ServerState) -> np.ndarray:
        """The users' rows in a state, float32 [users, size], on the host."""
        return np.asarray(jax.device_get(state.opt_state[1]))

    def run(self, state: ServerState, steps: int) -> Iterator[tuple[ServerState, int, float]]:
        """See `CentralTraining.run`."""
        return run_steps(
            self._step, self._root, self._batcher.batch, state, steps, self._per_report, self._mesh
        )


def _trained(params: Params, rows: jax.Array, layout: Layout) -> dict[str, Any]:
    """What the optimiser sees."""
    return {"shared": select(params, _shared(layout)), "rows": rows}


def _shared(layout: Layout) -> list[bool]:
    """For each variable in order, whether it is no local one."""
    return [not stays for stays in layout.local]


def local_step(loss: Loss, optimizer: optax.GradientTransformation, layout: Layout) -> Any:
    """A step (state, batch, root) -> (state, loss) of `LocalCentralTraining`.

    The root is the key of what steps draw; each folds in its number.

    Args:
      loss: of one user's parameters. optimizer: of all. layout: what is local.
    """

    def step(
        state: ServerState, batch: dict[str, jax.Array], root: jax.Array
    ) -> tuple[ServerState, jax.Array]:
        batch = dict(batch)
        user = batch.pop("user")[0]
        opt_state, rows = state.opt_state
        key = jax.random.fold_in(root, state.round)

        def of_user(params, row):
            return loss(layout.insert(params, row), batch, key)

        (value, _), (by_params, by_row) = jax.value_and_grad(of_user, (0, 1), has_aux=True)(
            state.params, rows[user]
        )
        grads = _trained(by_params, jnp.zeros_like(rows).at[user].set(by_row), layout)
        before = _trained(state.params, rows, layout)
        updates, opt_state = optimizer.update(grads, opt_state, before)
        after = optax.apply_updates(before, updates)
        params = merge(after["shared"], state.params, _shared(layout))
        return ServerState(params, (opt_state, after["rows"]), state.round + 1), value

    return step
