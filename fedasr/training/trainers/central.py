"""Central training as a stage of a run: the seed, or the baseline that forgets the users."""

import math
from typing import Any

import jax

from fedasr.data.batching import Padding
from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.server import ServerState
from fedasr.privacy import ledger
from fedasr.privacy.ledger import Users
from fedasr.training import seeds
from fedasr.training.builders import models, pooled
from fedasr.training.central import CentralTraining
from fedasr.training.session import Parts, Session
from fedasr.training.totals import Totals


def seed_training(parts: Parts) -> CentralTraining:
    """Of the seed, which each process trains alike."""
    corpus, loss = parts.data.seed, models.build_base(parts.config).loss
    assert corpus is not None  # where the seed is trained on
    return pooled.central_training(
        parts.config, "seed_training", corpus, loss, parts.process_devices
    )


def train_seed(session: Session, latest: int | None, units: int) -> Any:
    """Central training on the seed's split; returns parameters to start the main stage."""
    parts = session.parts
    # What is adapted is a seed that was trained whole.
    params = models.base_params(parts.config)
    if not parts.seed_steps:
        return models.completed(params, parts.config)
    kept = seeds.folder_of(session, session.workdir) if parts.config.seed_training.reuse else None
    if kept is not None and (found := seeds.find(kept, params)) is not None:
        session.message(f"the seed is that of {kept}, which has the same settings and data")
        return models.completed(found, parts.config)
    state = _steps(session, "seed", seed_training(parts), params, latest, units, parts.seed_steps)
    params = hosts.leaders(state.params)
    if kept is not None:
        try:
            seeds.save(session, kept, params)
        except (OSError, UserError) as error:  # later runs train it again
            session.logger.failed("seed", f"it is not kept: {' '.join(str(error).split())[:300]}")
    return models.completed(params, parts.config)


def _steps(
    session: Session,
    stage: str,
    training: Any,
    params: Any,
    latest: int | None,
    units: int,
    total: int,
) -> ServerState:
    state = training.init(params)
    if latest is not None:
        state = training.transfer(session.checkpointer.restore(latest, jax.device_get(state))[0])
    before = 0 if stage == "seed" else session.parts.seed_steps
    config, over = session.parts.config, False
    every = config.checkpoint.seed_every
    phase = "seed" if stage == "seed" else "central"
    session.logger.start(before + total, before + units, phase)
    for state, done, loss in training.run(state, total - units):
        record: dict[str, Any] = {"loss": loss}
        if stage == "main":  # whose steps are counted on from the seed's
            record |= {"stage": stage, **_rates(session, state, done, total)}
        session.logger.step(before + done, record)
        session.totals.loss_is_finite = math.isfinite(loss)
        if stage == "main":
            over = session.evaluated(done, {"step": before + done, **record}, state)
        if over and done < total:
            break
        due = bool(every) and done % every == 0
        if done < total and (due or session.is_old()):
            session.save(stage, done, state)
        session.check_stop(stage, done, state)
    return state


def _rates(session: Session, state: ServerState, done: int, total: int) -> dict[str, Any]:
    """Error rates of the baseline while it trains; at its end the summary has them."""
    config = session.parts.config
    every = config.evaluation.every_steps
    if done == total and not session.selection.wanted:
        return {}
    if done != total and not (every and done % every == 0):
        return {}
    return {"eval": session.evaluate(state.params, config.evaluation.while_training)}


class CentralTrainer:
    """The baseline: the training users' examples, pooled. A unit is a step."""

    chunk = None

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._total = parts.config.central.steps
        self._users = Users.of(parts.data.train.users)

    def _training(self, session: Session | None = None) -> Any:
        """What trains, within a session if there is one."""
        parts = self._parts
        corpus, loss = parts.data.train, parts.recogniser.loss
        return pooled.central_training(parts.config, "central", corpus, loss, parts.devices)

    def train(self, session: Session, params: Any, latest: int | None, units: int) -> ServerState:
        """See `Trainer`."""
        training = self._training(session)
        if latest is None:
            start = training.init(params)
            session.save("main", 0, start)
            session.evaluated(0, {"step": session.parts.seed_steps, "eval": session.initial}, start)
        total = units if session.selection.is_over(units) else self._total
        state = _steps(session, "main", training, params, latest, units, total)
        session.save("main", int(state.round), state)
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
