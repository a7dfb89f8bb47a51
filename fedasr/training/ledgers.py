"""What the users of a run, and of all runs behind its model, have been charged."""

from collections.abc import Sequence
from pathlib import Path

from fedasr.privacy import ledger
from fedasr.privacy.ledger import Users
from fedasr.privacy.mechanism import Mechanism
from fedasr.training.builders import pretrained
from fedasr.training.checkpoint import (
    has_checkpoint,
)
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.config import Config


def earlier_runs(config: Config) -> tuple[list[ledger.Entry], bool]:
    """What the ledger of `init_from` holds, and whether it has one (so has a start from nothing).

    Raises:
      UserError: the ledger cannot be read.
    """
    if not config.init_from:
        return [], True
    if pretrained.is_pretrained(config):
        return [], False
    data = checkpoint_metadata(config.init_from).get("ledger")
    if data is None:
        return [], False
    return ledger.from_data([*data["earlier"], *data["own"]]), bool(data["known"])


def runs_before(config: Config, started: str | Path | None) -> tuple[list[ledger.Entry], bool]:
    """The ledger that a run starts with: its own checkpoint's, if it has one already.

    The model that it started from need not be there any more.

    Args:
      config: of the run.
      started: its work directory or checkpoint; None if there is none.
    """
    if started is None or not has_checkpoint(started):
        return earlier_runs(config)
    kept = checkpoint_metadata(started).get("ledger")
    if kept is None:
        return [], False
    return ledger.from_data(kept["earlier"]), bool(kept["known"])


def run_entry(
    name: str,
    config: Config,
    mechanism: Mechanism,
    rounds: int,
    users: Users,
    deployments: Sequence[tuple[float, int]] = (),
) -> ledger.Entry:
    """The ledger's entry of a run's federated rounds."""
    if not config.privacy.enabled:
        return ledger.without_privacy(name, "rounds", rounds, users)
    return ledger.of_mechanism(name, mechanism, rounds, users, deployments)
