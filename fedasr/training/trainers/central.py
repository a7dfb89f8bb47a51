"""Central training as a stage of a run: the seed, or the baseline that forgets the users."""

import math
from typing import Any

import jax

from fedasr.data.batching import Padding
from fedasr.federated import hosts
from fedasr.federated.server import ServerState
from fedasr.privacy import ledger
from fedasr.privacy.ledger import Users
from fedasr.training.builders import models, pooled
from fedasr.training.central import CentralTraining
from fedasr.training.session import Parts, Session
from fedasr.training.totals import Totals


def seed_training(parts: Parts) -> CentralTraining:
    """Of the seed, which each process trains alike."""
    corpus, loss = parts.data.seed, parts.recogniser.loss
    assert corpus is not None  # where the seed is trained on
    return pooled.central_training(parts.config, "seed_training", corpus, loss, parts.own_devices)


def train_seed(session: Session, latest: int | None, units: int) -> Any:
    """Central training on the seed's split; returns parameters to start the main stage."""
    parts = session.parts
    params = models.initial_params(parts.recogniser, parts.config)
    if not parts.seed_steps:
        return params
    state = _steps(session, "seed", seed_training(parts), params, latest, units, parts.seed_steps)
    return hosts.leaders(state.params)


def _steps(
    session: Session,
    stage: str,
    training: CentralTraining,
    params: Any,
    latest: int | None,
    units: int,
    total: int,
) -> ServerState:
    state = training.init(params)
    if latest is not None:
        state = training.place(session.checkpointer.restore(latest, jax.device_get(state))[0])
    before = 0 if stage == "seed" else session.parts.seed_steps
    every = session.parts.config.checkpoint.seed_every
    session.logger.start(before + total, before + units, "seed")
    for state, done, loss in training.run(state, total - units):
        session.logger.step(before + done, {"loss": loss})
        session.totals.loss_is_finite = math.isfinite(loss)
        due = bool(every) and done % every == 0
        if done < total and (due or session.is_old()):
            session.save(stage, done, state)
        session.check_stop(stage, done, state)
    return state


class CentralTrainer:
    """The baseline: the training users' examples, pooled. A unit is a step."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._total = parts.config.central.steps
        self._users = Users.of(parts.data.train.users)

    def _training(self) -> CentralTraining:
        parts = self._parts
        corpus, loss = parts.data.train, parts.recogniser.loss
        return pooled.central_training(parts.config, "central", corpus, loss, parts.devices)

    def train(self, session: Session, params: Any, latest: int | None, units: int) -> ServerState:
        """See `Trainer`."""
        training = self._training()
        if latest is None:
            session.save("main", 0, training.init(params))
        state = _steps(session, "main", training, params, latest, units, self._total)
        session.save("main", self._total, state)
        return state

    def entry(self, run: str, units: int) -> ledger.Entry:
        """See `Trainer`."""
        return ledger.without_privacy(run, "central", units, self._users)

    def logged(self, units: int, seed_steps: int) -> tuple[int, int]:
        """See `Trainer`."""
        return 0, seed_steps + units

    def padding(self, totals: Totals) -> Padding:
        """See `Trainer`."""
        return self._training().padding(self._total)

    def describe(self, session: Session, state: ServerState) -> dict[str, Any]:
        """See `Trainer`."""
        return {
            "rounds": 0,
            "central_steps": session.parts.seed_steps + int(state.round),
            "cohort": None,
            "privacy": {"enabled": False, "epsilon": None, "extrapolations": []},
            "clients": [],
            "client_updates": None,
            "chunk": None,
        }
