"""Rows of local parameters on their way between a store and the devices, of all processes."""

import collections

import jax
import numpy as np

from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.client import Params
from fedasr.federated.local import LocalStore

_AHEAD = 2  # chunks that the devices may have in hand while local parameters are written


class CohortRows:
    """The cohort's local parameters on their way from the store to the devices and back.

    Args:
      store: with the rows of `round`.
      round, params: of the server's state.

    Raises:
      UserError: the store's rows are those of another round.
    """

    def __init__(self, store: LocalStore, round: int, params: Params) -> None:
        if store.round != round:
            raise UserError(
                f"the local parameters are those after round {store.round}, the model is that "
                f"after round {round}: restore them to it"
            )
        store.discard()  # of a round that was begun and not ended
        self._store = store
        # The server leaves it alone.
        self._init = np.asarray(store.layout.extract(hosts.on_host(params)))
        self._pending: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

    def gather(self, users: np.ndarray) -> np.ndarray:
        """float32 [clients, n] of this process's clients; zeros for empty slots (user -1)."""
        rows = np.zeros((len(users), len(self._init)), np.float32)
        rows[users >= 0] = self._store.gather(users[users >= 0], self._init)
        return rows

    def take_back(self, users: np.ndarray, rows: jax.Array) -> None:
        """Writes a chunk's new rows, when the devices have the next chunks in hand."""
        self._pending.append((users, rows))
        if len(self._pending) > _AHEAD:
            self._write_next()

    def commit(self) -> None:
        """Ends the round."""
        while self._pending:
            self._write_next()
        commit(self._store)

    def _write_next(self) -> None:
        users, rows = (hosts.everybodys(x) for x in self._pending.popleft())
        self._store.write(users[users >= 0], rows[users >= 0])


def commit(store: LocalStore) -> None:
    """Ends a store's round in all processes, of which one has written: all may read its rows."""
    store.commit()
    hosts.any_process(False)
