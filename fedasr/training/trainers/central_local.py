"""The central baseline in which every user keeps local parameters of their own."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedasr.federated.cohort_rows import commit
from fedasr.federated.local import LocalStore
from fedasr.federated.server import ServerState
from fedasr.training.builders import pooled
from fedasr.training.central_local import LocalCentralTraining
from fedasr.training.session import Session
from fedasr.training.trainers.central import CentralTrainer


class LocalCentralTrainer(CentralTrainer):
    """As `CentralTrainer`, a batch being of one user: see `LocalCentralTraining`.

    The rows are trained on the devices. Whatever reads them finds them in the run's store, as those
    of federated training, with the number of steps as the round.
    """

    def _training(self, session: Session | None = None) -> Any:
        parts = self._parts
        training = pooled.local_central_training(
            parts.config, parts.data.train, parts.recogniser.loss, parts.devices
        )
        return training if session is None else _Stored(training, session)


class _Stored:
    """Training that tells the session how the store gets its rows."""

    def __init__(self, training: LocalCentralTraining, session: Session) -> None:
        self._training, self._session = training, session
        self.init, self.transfer = training.init, training.transfer

    def run(self, state: ServerState, steps: int) -> Iterator[tuple[ServerState, int, float]]:
        """See `LocalCentralTraining.run`."""
        for state, done, loss in self._training.run(state, steps):
            store = self._session.parts.store
            assert store is not None  # or nothing would be local
            write = functools.partial(write_rows, store, self._training, state)
            self._session.refresh_rows = write
            yield state, done, loss


def write_rows(store: LocalStore, training: LocalCentralTraining, state: ServerState) -> None:
    """Writes a state's rows as those of the round that is its number of steps, unless they are.

    Args:
      store: of all users of the training. training: whose state it is.
    """
    steps = int(state.round)
    if store.round == steps:
        return
    store.advance(steps)
    store.write(np.arange(store.users), training.rows(state))
    commit(store)
