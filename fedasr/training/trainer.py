"""What trains the main stage of a run: federated rounds, or steps on pooled data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fedasr.data.batching import Padding
from fedasr.federated.server import ServerState
from fedasr.privacy import ledger
from fedasr.training.totals import Totals

if TYPE_CHECKING:
    from fedasr.training.session import Session


class Trainer(Protocol):
    """A kind of training. Its units, which checkpoints count, are rounds or steps."""

    @property
    def chunk(self) -> int | None:
        """Clients that are computed together; None where there are none."""

    def train(self, session: Session, params: Any, latest: int | None, units: int) -> ServerState:
        """Trains to the end.

        Args:
          session: of the run, for evaluation, checkpoints and log.
          params: to start from; when resuming, any of the same shapes.
          latest: number of the checkpoint to go on from; None for a start.
          units: that are done there.

        Raises:
          Interrupted: the run was asked to stop.
        """

    def entry(self, run: str, units: int) -> ledger.Entry:
        """What the users have been charged for after so many units of the run of this name."""

    def logged(self, units: int, seed_steps: int) -> tuple[int, int]:
        """(rounds, steps) that the log has seen after so many units and steps of the seed."""

    def padding(self, totals: Totals) -> Padding:
        """What was computed, and how much of it was real."""

    def describe(self, session: Session, state: ServerState) -> dict[str, Any]:
        """Its own keys of the summary."""
