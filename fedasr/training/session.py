"""What the stages of a run share: its parts, log, checkpoints, evaluation, totals and ledger."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedasr.data.corpus import find_users
from fedasr.federated import hosts
from fedasr.federated.local import LocalStore, Rows
from fedasr.federated.server import ServerState
from fedasr.models.recogniser import Recogniser
from fedasr.privacy import ledger
from fedasr.privacy.ledger import Users
from fedasr.streams import ROOT_WORDS, make_root, public_name, secret_root
from fedasr.training import exactness, ledgers, rows, selection
from fedasr.training.builders import corpora, devices, evaluators, identities, models, pooled
from fedasr.training.cadence import Cadence
from fedasr.training.checkpoint import Checkpointer, CheckpointReader, read_metadata
from fedasr.training.config import Config
from fedasr.training.evaluation import Decoded, Evaluator
from fedasr.training.interrupts import StopFlag
from fedasr.training.logging import RunLogger, say, to_json
from fedasr.training.overfitting import Watch
from fedasr.training.selection import Selection
from fedasr.training.totals import Totals
from fedasr.training.trainer import Trainer
from fedasr.training.workdir import STATE_ADDED


class Interrupted(Exception):
    """The run was asked to stop; its directory can be resumed."""


def message(text: str, logger: RunLogger | None = None) -> None:
    """Says it once, whatever the number of processes; to the log as soon as there is one."""
    if hosts.is_leader():
        logger.message(text) if logger else say(text)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The objects of a run, made from its configuration.

    Attributes:
      config: of the run.
      data: its corpora.
      recogniser: its model.
      devices: of all processes; process_devices: of this one. What is not spread over
        processes is done by each, and alike.
      evaluator: of its parameters.
      store: the users' local parameters; None if there are none.
    """

    config: Config
    data: corpora.Data
    recogniser: Recogniser
    devices: Sequence[jax.Device]
    process_devices: Sequence[jax.Device]
    evaluator: Evaluator
    store: LocalStore | None

    @property
    def seed_steps(self) -> int:
        """Steps of central training before the main stage."""
        return self.config.seed_training.steps if self.data.seed else 0


def make_parts(config: Config, directory: Path, workdir: Path) -> Parts:
    """Makes the objects of a run.

    Args:
      config: of the run.
      directory: of the prepared data.
      workdir: where local parameters lie.

    Raises:
      UserError: for data that does not fit the configuration, or settings that make no sense.
    """
    recogniser, used = models.build_recogniser(config), devices.run_devices(config)
    own = [device for device in used if device.process_index == jax.process_index()]
    data = corpora.Data(directory, config, message)
    pooled.check_central(config, data, own)
    selection.check(config, data)
    layout = models.local_layout(config)
    evaluator = evaluators.make_evaluator(config, recogniser, data, own, layout)
    store = None
    if layout is not None:
        store = _open_store(config, workdir, layout, len(data.train.users))
    return Parts(config, data, recogniser, used, own, evaluator, store)


def _open_store(config: Config, workdir: Path, layout: Rows, users: int) -> LocalStore:
    """The users' local parameters, which the leader writes and the others read."""
    leader = hosts.is_leader()
    for turn in (True, False):
        if leader == turn:
            folder, prototype = workdir / rows.LOCAL_FOLDER, config.local.prototype
            store = LocalStore(folder, layout, users, prototype, read_only=not leader)
        if turn:
            hosts.wait_for_all("store")
    return store


class Session:
    """The state of one process's part of a run.

    Checkpoints are numbered by the steps of the seed plus the units (rounds, or steps of the
    central baseline) of the main stage; `stage` tells which state they hold.

    Attributes:
      parts: see there. trainer: of the main stage.
      workdir: of the run. logs: where this process writes: the work directory in the leader; what
        others write is for nobody.
      checkpointer: writes them in the leader, reads them in others.
      latest: number of the newest checkpoint at the start; None if there was none. metadata: of it.
      past: (entries, whether known) of the ledger that the run started with.
      totals: what it adds up. initial, final: error rates by split, as soon as they are known.
      decoded: what the last evaluation of each split heard.
      trackers: of others that are told of it, by name.
      cadence: when checkpoints are due.
      refresh_rows: brings the store up to date, where training keeps the users' local parameters
        elsewhere; called before they are read or saved.
      selection: of the main stage's states, once it begins. watch: of its losses, likewise.
      name: of the run, which its root makes. history: of earlier ends.
    """

    logger: RunLogger
    refresh_rows: Callable[[], None] | None = None
    selection: Selection
    watch: Watch | None = None

    def __init__(
        self, parts: Parts, trainer: Trainer, workdir: Path, logs: Path, stop: StopFlag
    ) -> None:
        self.parts, self.trainer, self.logs, self.workdir = parts, trainer, logs, workdir
        self._stop, self._began = stop, time.monotonic()
        self.cadence = Cadence(parts.config.checkpoint)
        self._known: dict[str, np.ndarray] = {}
        self.totals = Totals()
        self.initial: dict[str, Any] = {}
        self.final: dict[str, Any] | None = None
        self.decoded: dict[str, list[Decoded]] = {}
        self.trackers: Sequence[str] = ()
        self.history: list[dict[str, Any]] = []
        self._root: np.ndarray | None = None
        config = parts.config
        self.name = public_name(make_root(identities.run_identity(config)))
        checkpoints = workdir / "checkpoints"
        self.checkpointer: Checkpointer | CheckpointReader
        if hosts.is_leader():
            self.checkpointer = Checkpointer(checkpoints, config.checkpoint.keep)
        else:
            self.checkpointer = CheckpointReader(checkpoints)
        self.latest = self.checkpointer.latest_step()
        for folder, why in getattr(self.checkpointer, "damaged", {}).items():
            self.message(f"warning: {why}; it was set aside as {folder.name}")
        newest = None if self.latest is None else checkpoints / str(self.latest)
        self.metadata = {} if newest is None else read_metadata(newest)
        self.past = ledgers.runs_before(config, newest)

    def message(self, text: str) -> None:
        """One line for people."""
        message(text, getattr(self, "logger", None))

    def wall_seconds(self) -> float:
        """Of the whole run, whatever stopped it in between."""
        return self.totals.wall_seconds + time.monotonic() - self._began

    def save(self, stage: str, units: int, state: ServerState) -> None:
        """Writes a checkpoint."""
        jax.block_until_ready(state)  # what is still computed is not waited for on account of this
        began = time.monotonic()
        self._save(stage, units, state)
        self.cadence.saved(time.monotonic() - began)

    def secret(self) -> np.ndarray | None:
        """A root that nobody can compute, if the configuration wants one; drawn once in a run.

        The rounds' state has it as soon as there is one; before, the checkpoints of the seed do:
        whatever is done again after them has the noise that it had.
        """
        if self.parts.config.privacy.noise_seed != "secret":
            return None
        if self._root is None:
            self._root = hosts.leaders(secret_root())
        return self._root

    def restore_seed(self, number: int, like: ServerState) -> ServerState:
        """The state of a checkpoint of the seed, whose root becomes the run's.

        Args:
          number: of the checkpoint. like: any state of the seed's training.
        """
        if self.parts.config.privacy.noise_seed == "secret":
            like = like._replace(root=np.zeros(ROOT_WORDS, np.uint32))
        state, _ = self.checkpointer.restore(number, like, STATE_ADDED)
        if np.any(state.root):  # older releases kept none
            self._root = np.asarray(state.root)
        return state._replace(root=())

    def is_old(self) -> bool:
        """Whether the last checkpoint is so old that the run is to be saved; alike in all."""
        if not self.parts.config.checkpoint.every_seconds:
            return False
        leader = hosts.is_leader()  # the others have none to be busy with
        return hosts.any_process(leader and self.cadence.is_old(self.checkpointer.busy))

    def _metadata(self, stage: str, units: int) -> dict[str, Any]:
        """Of a checkpoint."""
        earlier, known = self.past
        store = self.parts.store
        return {
            **({} if store is None else rows.described(store)),
            "stage": stage,
            "units": units,
            **exactness.here(self.parts.devices, self.trainer.chunk),
            "config": self.parts.config.tree(),
            "ledger": {
                "known": known,
                "earlier": ledger.to_data(earlier),
                "own": ledger.to_data(self.run_entries(stage, units)),
            },
            "totals": dataclasses.asdict(self.totals) | {"wall_seconds": self.wall_seconds()},
            "initial": to_json(self.initial),
            "history": to_json(self.history),
            "best": self.selection.best[0] if stage == "main" and self.selection.best else None,
        }

    def _save(self, stage: str, units: int, state: ServerState) -> None:
        seed_steps, store = self.parts.seed_steps, self.parts.store
        if store is not None:
            self._refresh()
            store.flush()
        metadata = self._metadata(stage, units)
        if stage == "main":
            self.selection.settle()
        number = units if stage == "seed" else seed_steps + units
        if stage == "seed" and (root := self.secret()) is not None:
            state = state._replace(root=root)
        self.checkpointer.save(number, state, metadata)
        if store is not None and (oldest := self.checkpointer.oldest_step()) is not None:
            best = self.selection.best if stage == "main" else None
            store.release(min(oldest - seed_steps, best[0] if best else oldest))

    def run_entries(self, stage: str, units: int) -> list[ledger.Entry]:
        """What this run's users have been charged for, by stage."""
        entries, seed_steps, corpus = [], self.parts.seed_steps, self.parts.data.seed
        if corpus is not None and seed_steps:
            steps = units if stage == "seed" else seed_steps
            seed = Users.of(corpus.users)
            entries.append(ledger.without_privacy(self.name, "seed", steps, seed))
        return entries if stage == "seed" else [*entries, self.trainer.entry(self.name, units)]

    def check_stop(self, stage: str, units: int, state: ServerState) -> None:
        """Raises Interrupted, after a checkpoint, if the run was asked to stop."""
        self.cadence.unit()
        for text in self.cadence.warnings(self.checkpointer.seconds):
            self.message(text)
        if hosts.any_process(self._stop.requested):
            self.save(stage, units, state)
            self.checkpointer.wait()
            hosts.wait_for_all("stopped")
            raise Interrupted(f"stopped in {stage} at {units}: run the same command to go on")

    def begin_main(self, begun: bool, unit: str, best: int | None = None) -> None:
        """Before the main stage.

        Args:
          begun: whether it goes on from a checkpoint of its own.
          unit: "round" or "step", what it counts.
          best: of that checkpoint's metadata.
        """
        config = self.parts.config
        self.selection = Selection(config, self.workdir, begun, best)
        named = (config.selection.split, *config.evaluation.while_training)
        split = next((name for name in named if name in self.parts.data.evaluation), None)
        if split is not None:
            self.watch = Watch(unit, split, self.selection.wanted, self.logger.kept)

    def evaluated(self, units: int, record: Mapping[str, Any], state: ServerState) -> bool:
        """After each record of the main stage: keeps what is best, and warns.

        Args:
          units: rounds or steps done.
          record: as it was logged, with "eval" if it was evaluated.
          state: of the training.

        Returns:
          Whether there will be nothing better, as far as the configuration is patient.
        """
        if self.watch is not None and (text := self.watch.add(record)):
            self.message(f"warning: {text}")
        if not self.selection.wanted or not record.get("eval"):
            return False
        self.selection.offer(units, record["eval"], state, self._metadata("main", units))
        if over := self.selection.is_over(units):
            self.message(f"no better error rate for long, training ends at {units}")
        return over

    def evaluate(
        self, params: Any, splits: Sequence[str] | None = None
    ) -> dict[str, dict[str, float]]:
        """Error rates by split, of those that there are; None for all."""
        corpora = self.parts.data.evaluation
        if jax.process_count() > 1:
            params = hosts.on_host(params)
        return {
            split: self._evaluate(params, split)
            for split in (corpora if splits is None else splits)
            if split in corpora
        }

    def _evaluate(self, params: Any, split: str) -> dict[str, float]:
        corpus, evaluator = self.parts.data.evaluation[split], self.parts.evaluator
        decoded, loss = evaluator.decoded(params, corpus, self._rows(params, split))
        self.decoded[split] = decoded
        return evaluator.rates(decoded, loss)

    def _refresh(self) -> None:
        if self.refresh_rows is not None:
            self.refresh_rows()

    def _rows(self, params: Any, split: str) -> Any:
        """From a split's users to their rows; None where these hold no part of a model."""
        data, store = self.parts.data, self.parts.store
        if store is None or not store.layout.personal:
            return None
        self._refresh()
        if split not in self._known:
            self._known[split] = find_users(data.train, data.evaluation[split])
        return store.rows_of(self._known[split], params)
