"""Federated rounds as the main stage of a run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedasr.data.batching import Padding
from fedasr.errors import UserError
from fedasr.federated import chunks, hosts
from fedasr.federated.metrics import RoundMetrics
from fedasr.federated.server import ServerState
from fedasr.federated.simulation import Simulation
from fedasr.privacy import accounting, ledger
from fedasr.privacy.ledger import Users
from fedasr.streams import ROOT_WORDS, public_name
from fedasr.training import describe, ledgers
from fedasr.training.builders import algorithms, batches, clients, mechanisms, models, simulations
from fedasr.training.builders.devices import described, device_name
from fedasr.training.checkpoint import read_metadata, step_folders
from fedasr.training.config import fingerprint
from fedasr.training.logging import write_json_atomic
from fedasr.training.session import Parts, Session
from fedasr.training.stored import Unreadable
from fedasr.training.totals import Totals
from fedasr.training.workdir import STATE_ADDED, read_json

CHUNK_FILE = "chunk.json"  # what chunk="auto" came to, or what fitted: a resumed run takes it again


class FederatedTrainer:
    """Rounds over cohorts of users. A unit is a round.

    Args:
      parts: of the run.
      workdir: where it is kept how many clients are computed together.

    Attributes:
      simulations: (rounds until which it runs, simulation), in order: SpecAugment may begin later
        than round 0.

    Raises:
      UserError: for settings that make no sense together, or deployments that cannot be claimed.
    """

    def __init__(self, parts: Parts, workdir: Path) -> None:
        config = parts.config
        self._parts, self._chunk_file = parts, workdir / CHUNK_FILE
        self._users = Users.of(parts.data.train.users)
        self.simulations = self._make(self._kept_chunk(workdir))
        mechanism = self.simulations[0][1].mechanism
        mechanisms.check_deployments(config, mechanism)
        ledgers.check_extension(workdir, config, mechanism, self._users)

    def _make(self, chunk: int | None) -> list[tuple[int, Simulation]]:
        parts, config = self._parts, self._parts.config
        losses = [(config.rounds, parts.recogniser.loss)]
        if config.augment.enabled and (start := config.augment.start_round):
            plain = models.build_recogniser(config, augmented=False)
            losses.insert(0, (min(start, config.rounds), plain.loss))
        made: list[tuple[int, Simulation]] = []
        for until, loss in losses:
            simulation = simulations.make_simulation(
                config, parts.data, loss, parts.devices, parts.store, chunk
            )
            made.append((until, simulation))
            chunk = made[0][1].chunk
        return made

    @property
    def chunk(self) -> int:
        """See `Trainer`."""
        return self.simulations[0][1].chunk

    def _kept_chunk(self, workdir: Path) -> int | None:
        """What it was before, on the same devices; None for a start.

        As its file says; and where that was lost, the latest checkpoint.
        """
        devices = self._parts.devices
        kept = read_chunk(self._chunk_file)
        if kept.get("device") == device_name(devices):
            return kept["chunk"]
        for folder in reversed(step_folders(workdir / "checkpoints")):
            try:
                metadata = read_metadata(folder)
            except Unreadable:
                continue  # damaged: the next older one counts, see `Checkpointer`
            return metadata.get("chunk") if metadata.get("devices") == described(devices) else None
        return None

    def _keep_chunk(self, chunk: int | None = None) -> None:
        """The float additions of a resumed run are in the order of the first."""
        chunk = chunk or self.simulations[0][1].chunk
        if hosts.is_leader() and chunk != self._parts.config.chunk:
            kept = {"chunk": chunk, "device": device_name(self._parts.devices)}
            write_json_atomic(self._chunk_file, kept | {"check": fingerprint(kept)})

    def train(self, session: Session, params: Any, latest: int | None, units: int) -> ServerState:
        """See `Trainer`."""
        config = self._parts.config
        total, simulation = config.rounds, self.simulations[0][1]
        state = self._begin(session, simulation, params, latest)
        names = simulation.layer_names(params)
        session.name = public_name(state.root)
        session.logger.start(total, units)
        if session.selection.is_over(units):
            return state
        for state, metrics, compiled in self._rounds(session, state, units):
            session.totals.add(metrics, compiled)
            record = _record(metrics, names) | _turnout(metrics, session.totals)
            record |= self._rates(session, state, metrics.round)
            session.logger.round(metrics.round, record)
            over = session.evaluated(metrics.round, {"round": metrics.round, **record}, state)
            last = over or metrics.round == total
            if last or metrics.round % config.checkpoint.every == 0 or session.is_old():
                session.save("main", metrics.round, state)
            if over:
                break
            if not last:
                session.check_stop("main", metrics.round, state)
        return state

    def _begin(
        self, session: Session, simulation: Simulation, params: Any, latest: int | None
    ) -> ServerState:
        """The state of a start, or of a checkpoint."""
        state = simulation.init(params, session.secret() if latest is None else None)
        if latest is None:
            session.name = public_name(state.root)
            # In this order: a run that resumes from this checkpoint does not log round 0 again.
            session.logger.round(0, {"eval": session.initial})
            session.save("main", 0, state)
            session.evaluated(0, {"round": 0, "eval": session.initial}, state)
            return state
        nothing = np.zeros(ROOT_WORDS, np.uint32)
        like = jax.device_get(state)._replace(root=nothing)
        restored, _ = session.checkpointer.restore(latest, like, STATE_ADDED)
        if not restored.root.any():
            # Of a release whose rounds had other streams. Not the root of a run that would
            # begin now: the rounds to come would share its noise.
            root = session.secret()
            root = simulation.root_of(restored.params) if root is None else root
            restored = restored._replace(root=root)
        return simulation.transfer(restored)

    def _rounds(
        self, session: Session, state: ServerState, done: int
    ) -> Iterator[tuple[ServerState, RoundMetrics, bool]]:
        """(state, metrics, whether something was compiled) of the rounds after the first `done`."""
        self._keep_chunk()
        shrunk, number = False, 0
        while number < len(self.simulations):
            until, simulation = self.simulations[number]
            compiled = 0
            try:
                for state, metrics in simulation.run(state, max(until - done, 0)):
                    done = metrics.round
                    yield state, metrics, simulation.compilations() > compiled
                    compiled = simulation.compilations()
                number += 1
            except jax.errors.JaxRuntimeError as error:
                if not chunks.is_out_of_memory(error) or jax.process_count() > 1:
                    raise
                self._halve(session, done, shrunk, error)
                shrunk = True
                state = self.simulations[number][1].transfer(state)
                self._keep_chunk()

    def _halve(self, session: Session, done: int, shrunk: bool, error: Exception) -> None:
        """Makes the simulations anew with half as many clients at a time, once.

        Args:
          session: of the run, whose totals keep that it was so.
          done: rounds. shrunk: whether they were halved before. error: of the device.

        Raises:
          UserError: they were halved before, or there is one client at a time already.
        """
        chunk = self.chunk
        short = f"out of memory on {device_name(self._parts.devices)} with chunk={chunk}"
        if shrunk or chunk == 1:
            self._keep_chunk(max(1, chunk // 2))
            raise UserError(
                f"{short}: the same command tries half of that; or take smaller batches or "
                "gradient checkpointing"
            ) from error
        session.message(
            f"{short}: going on with chunk={chunk // 2}: from round {done + 1} on sums are in "
            "another order, so that parameters agree with those of a run that has the memory up "
            "to rounding, and not bit for bit"
        )
        self.simulations = self._make(chunk // 2)
        number = self._parts.seed_steps + done
        session.totals.device_changes.append(f"chunk={chunk} -> chunk={chunk // 2} at {number}")

    def _rates(self, session: Session, state: ServerState, round: int) -> dict[str, Any]:
        """Error rates and epsilon, of the rounds that have them."""
        config, rates = self._parts.config, None
        every = config.evaluation.every
        if round == config.rounds and not session.selection.wanted:
            rates = session.final = session.evaluate(state.params)
        elif round == config.rounds or (every and round % every == 0):
            rates = session.evaluate(state.params, config.evaluation.while_training)
        if rates is None:
            return {}
        epsilon = self._epsilon(round)
        return {"eval": rates} | ({"epsilon": epsilon} if epsilon else {})

    def _epsilon(self, round: int) -> float | None:
        """As deployed."""
        privacy = self._parts.config.privacy
        if not privacy.enabled or not privacy.deployments:
            return None
        deployed = self.simulations[0][1].mechanism.deployed(*privacy.deployments[0])
        # The quicker of the two accountants: a round should not wait seconds for the other.
        relation = deployed.sampler.neighboring_relation
        return accounting.rdp_epsilon(deployed.event(round), privacy.delta, relation)

    def entry(self, run: str, units: int) -> ledger.Entry:
        """See `Trainer`."""
        config, mechanism = self._parts.config, self.simulations[0][1].mechanism
        cases = config.privacy.deployments
        if config.selection.split:  # which state is kept, be it the first, depends on all rounds
            units = config.rounds
        return ledgers.run_entry(run, config, mechanism, units, self._users, cases)

    def logged(self, units: int, seed_steps: int) -> tuple[int, int]:
        """See `Trainer`."""
        return units, seed_steps

    def padding(self, totals: Totals) -> Padding:
        """See `Trainer`."""
        return Padding(totals.real, totals.computed)

    def describe(self, session: Session, state: ServerState) -> dict[str, Any]:
        """See `Trainer`."""
        config, rounds = self._parts.config, int(state.round)
        earlier, known = session.past
        simulation = self.simulations[0][1]
        return {
            "rounds": rounds,
            "central_steps": self._parts.seed_steps,
            "cohort": config.cohort or len(self._parts.data.train.users),
            "privacy": describe.describe_privacy(
                simulation.mechanism,
                config,
                config.rounds if config.selection.split else rounds,
                algorithms.sent_shapes(config, state.params),
                [*earlier, self.entry(session.name, rounds)],
                known,
            ),
            "clients": self._clients(state.params),
            "client_updates": session.totals.client_updates,
            "chunk": simulation.chunk,
        }

    def _clients(self, params: Any) -> list[dict[str, Any]]:
        """What a client receives, sends and, if asked for, needs in memory."""
        config, parts = self._parts.config, self._parts
        if not config.compression.measure:
            local = None if parts.store is None else parts.store.layout.local
            described = clients.describe_client(config, params, local=local)
            return algorithms.with_extras(config, described)
        batch = batches.batch_shapes(config, parts.data.buckets[-1])
        return clients.describe_client(config, params, parts.recogniser.loss, batch)


def read_chunk(path: Path) -> dict[str, Any]:
    """What `chunk="auto"` came to; {} if nothing was written.

    Raises:
      UserError: the file is damaged.
    """
    kept = read_json(path)
    said = {name: kept.get(name) for name in ("chunk", "device")} if kept else {}
    # Files of releases before 2026-12 have no check.
    damaged = kept and (
        not isinstance(said["chunk"], int)
        or not isinstance(said["device"], str)
        or kept.get("check", "") not in ("", fingerprint(said))
    )
    if damaged or (kept is None and path.exists()):
        raise UserError(
            f"{path} is damaged: remove it, and chunk is found anew (another one adds in another "
            "order: the last bits may then differ)"
        )
    return kept or {}


def _record(metrics: RoundMetrics, names: Sequence[str]) -> dict[str, Any]:
    """A round, as it is logged."""
    norms = metrics.norms if len(metrics.norms) else np.full(len(names), np.nan)
    clipped = metrics.clipped if len(metrics.clipped) else np.full(len(names), np.nan)
    return {
        "loss": metrics.loss,
        "cohort": metrics.clients,
        "client_steps": metrics.steps,
        "update_norm": dict(zip(names, norms, strict=True)),
        "clipped_share": dict(zip(names, clipped, strict=True)),
        **_scales(metrics, names),
        "seconds": {"round": metrics.seconds, "data": metrics.waiting},
        "padding_fraction": metrics.padding.fraction,
        "invalid_client_updates": metrics.invalid,
    }


def _turnout(metrics: RoundMetrics, totals: Totals) -> dict[str, Any]:
    """What became of the users drawn, and the simulated clock after the round."""
    if (turnout := metrics.turnout) is None:
        return {}
    names = ("drawn", "unavailable", "dropped", "late", "seconds")
    found = {name: getattr(turnout, name) for name in names}
    return {"participation": found | {"clock": totals.simulated_seconds}}


def _scales(metrics: RoundMetrics, names: Sequence[str]) -> Mapping[str, Any]:
    scales = metrics.clip_scales
    if not len(scales):
        return {}
    return {
        "clip_scale": dict(
            zip(names, scales, strict=True) if len(scales) > 1 else [("all", scales[0])]
        )
    }
