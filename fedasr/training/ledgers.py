"""What the users of a run, and of all runs behind its model, have been charged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedasr.errors import UserError
from fedasr.privacy import ledger
from fedasr.privacy.ledger import Users
from fedasr.privacy.mechanism import Mechanism
from fedasr.training.builders import pretrained
from fedasr.training.checkpoint import has_checkpoint, step_folders
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.config import Config
from fedasr.training.stored import Unreadable


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


def check_extension(
    workdir: str | Path, config: Config, mechanism: Mechanism, users: Users
) -> None:
    """Refuses more rounds than a run was made for, if they would be of another mechanism.

    Such as by a release that accounts for the same settings in another way: an entry of the ledger
    has one mechanism for all its rounds.

    Args:
      workdir: of the run. config: it goes on with. mechanism: of the rounds to come. users: who
        train; of an empty digest where they are not known.

    Raises:
      UserError: by the ledger, the rounds that are done were another.
    """
    for folder in reversed(step_folders(Path(workdir) / "checkpoints")):
        try:
            metadata = checkpoint_metadata(folder)
            break
        except Unreadable:
            continue  # damaged: the next older one counts, see `Checkpointer`
    else:
        return
    own = (metadata.get("ledger") or {}).get("own") or []
    if metadata["stage"] != "main" or not own or metadata["config"]["rounds"] >= config.rounds:
        return
    cases = config.privacy.deployments
    ours = run_entry("", config, mechanism, int(own[-1]["rounds"]), users, cases)

    def released(entry: dict[str, Any]) -> list[Any]:
        known = entry["users"]["digest"] if users.digest else ""
        return [entry["event"], entry["relation"], entry["deployed"], known]

    (said,) = ledger.to_data([ours])
    if released(said) != released(own[-1]):
        raise UserError(
            f"--extend={config.rounds}: by its ledger the {own[-1]['rounds']} rounds in {workdir} "
            f"were of another mechanism ({own[-1]['sampling']}) than those to come would be "
            f"({ours.sampling}): start anew with --config.rounds={config.rounds} in another "
            "directory"
        )
