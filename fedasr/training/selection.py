"""Which state of the main training is kept: the best on a split, and when to stop looking.

The best state so far lies in the work directory's `best/`, a checkpoint like others. The choice
follows from what training sends out round by round and from the split's users; for users who train
it is post-processing. So they are charged for all rounds that were planned, whichever is kept and
whenever training stopped: which round that is may depend on all of them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedasr.data.corpus import shared_users
from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.server import ServerState
from fedasr.training.builders.corpora import Data
from fedasr.training.checkpoint import Checkpointer, CheckpointReader, read_metadata
from fedasr.training.config import Config
from fedasr.training.stored import BEST_FOLDER, Unreadable, has_checkpoint

Rates = Mapping[str, Mapping[str, float]]


def check(config: Config, data: Data | None = None) -> None:
    """Raises UserError for a selection that could not be made, or would cost privacy.

    Args:
      config: of the run.
      data: of the run; None where it is not known yet.
    """
    split, patience = config.selection.split, config.selection.patience
    if not split:
        if patience:
            raise UserError(
                f"selection.patience={patience} needs selection.split: name the split that is "
                "evaluated while training, such as dev"
            )
        return
    if config.local.patterns and config.has_rounds:
        raise UserError(
            "selection.split keeps a state of the shared model: users' local parameters of an "
            "earlier round are gone; unset local.patterns or selection.split"
        )
    if split not in config.data.eval or split not in config.evaluation.while_training:
        raise UserError(
            f"selection.split={split!r} must be evaluated while training: put it into data.eval "
            "and evaluation.while_training"
        )
    if not (config.evaluation.every if config.has_rounds else config.evaluation.every_steps):
        raise UserError(
            f"selection.split={split!r} needs evaluations while training: set evaluation.every "
            "(rounds) or evaluation.every_steps (central training)"
        )
    if data is None:
        return
    if split not in data.evaluation:
        raise UserError(
            f"selection.split={split!r}: {data.directory} has no such split: prepare the data with "
            "it, or set selection.split=''"
        )
    private = config.has_rounds and config.privacy.enabled
    if private and (shared := shared_users(data.train, data.evaluation[split])):
        raise UserError(
            f"selection.split={split!r}: {len(shared)} of its users ({shared[0]}...) train, and "
            "choosing by their speech has no noise: choose a split of other users"
        )


def not_covered(config: Config) -> list[str]:
    """What the choice means for privacy, for the report."""
    if not (split := config.selection.split):
        return []
    return [
        f"users of {split!r}, whose error rate chose the round that is kept: to training users the "
        "choice costs nothing beyond epsilon, which is that of all rounds planned"
    ]


def _reader(folder: Path, keep: int) -> CheckpointReader:
    del keep
    return CheckpointReader(folder)


class Selection:
    """The best state so far.

    Args:
      config: of the run.
      workdir: of the run; only its leader writes there.
      begun: whether the run goes on from a checkpoint; what an abandoned start left is removed.
      known: units after which that checkpoint had its best state; None for none, or not known.

    Attributes:
      best: (units, word error rate in percent, loss) of the state that is kept; None for none yet.

    Raises:
      UserError: the best state is lost.
    """

    def __init__(
        self, config: Config, workdir: Path, begun: bool, known: int | None = None
    ) -> None:
        self._split, self._patience = config.selection.split, config.selection.patience
        evaluation = config.evaluation
        self._every = evaluation.every if config.has_rounds else evaluation.every_steps
        self._folder = workdir / BEST_FOLDER
        self.best: tuple[int, float, float] | None = None
        self._writer: Checkpointer | CheckpointReader | None = None
        if not self._split:
            return
        leader = hosts.is_leader()
        if leader and not begun:
            shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._writer = (Checkpointer if leader else _reader)(self._folder, 1)
            if begun and has_checkpoint(self._folder):
                kept = read_metadata(self._folder)["selection"]
                self.best = kept["units"], kept["wer"], kept["loss"]
        except Unreadable as error:
            raise self._lost(workdir, str(error)[:200]) from error
        # What there is may be later than the checkpoint: the run gets there again.
        if begun and known is not None and (self.best is None or self.best[0] < known):
            raise self._lost(workdir, "it is not there")

    def _lost(self, workdir: Path, why: str) -> UserError:
        # A run that went on without would keep another state, and not say so.
        return UserError(
            f"the best state so far, in {self._folder}, is lost ({why}): put it back from a copy; "
            f"or, to train again from the start, remove {workdir / 'checkpoints'}"
        )

    @property
    def wanted(self) -> bool:
        """Whether there is anything to select by."""
        return bool(self._split)

    def offer(
        self, units: int, rates: Rates | None, state: ServerState, metadata: Mapping[str, Any]
    ) -> None:
        """Keeps a state if it is better than all before.

        Args:
          units: rounds or steps that it is after.
          rates: of its evaluation; None if there was none.
          state: of the training.
          metadata: of its checkpoint.
        """
        if self._writer is None or rates is None or self._split not in rates:
            return
        wer, loss = rates[self._split]["wer"], rates[self._split]["loss"]
        if not math.isfinite(loss):
            return
        # What a run has that goes on from an earlier checkpoint may be later: it gets there again.
        if self.best is not None and (wer, loss) >= self.best[1:]:
            return
        if self.best is not None and units <= self.best[0]:
            return
        self.best = units, float(wer), float(loss)
        chosen = {"split": self._split, "units": units, "wer": float(wer), "loss": float(loss)}
        self._writer.save(units, state, {**metadata, "selection": chosen})

    def settle(self) -> None:
        """Waits for what is being written: a checkpoint of the run may not know more than this."""
        if self._writer is not None:
            self._writer.wait()

    def is_over(self, units: int) -> bool:
        """Whether there was none better for as many evaluations as one is patient."""
        if not self._patience or self.best is None:
            return False
        return units - self.best[0] >= self._patience * self._every

    def chosen(self, state: ServerState) -> ServerState:
        """The last state with the parameters of the best; the same where nothing is selected."""
        if self._writer is None or self.best is None:
            return state
        self.settle()
        hosts.wait_for_all("selected")
        kept, _ = self._writer.restore(self.best[0], state)
        return state._replace(params=kept.params)

    def summary(self, units: int, planned: int) -> dict[str, Any] | None:
        """For the summary: what was chosen, of how many; None where nothing is selected.

        Args:
          units: done. planned: to do.
        """
        if self.best is None:
            return None
        chosen, wer, loss = self.best
        return {
            "split": self._split,
            "units": chosen,
            "wer": wer,
            "loss": loss,
            "of": units,
            "stopped_early": units < planned,
        }

    def close(self) -> None:
        """Waits for what is being written."""
        if self._writer is not None:
            self._writer.close()
