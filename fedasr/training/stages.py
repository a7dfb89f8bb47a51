"""The stages of a run, from wherever its last checkpoint is: seed, main stage, summary, report."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedasr.federated import hosts
from fedasr.training import exactness, rows, served, summaries
from fedasr.training.builders import models
from fedasr.training.logging import RunLogger, say
from fedasr.training.report import write_report
from fedasr.training.session import Interrupted, Session
from fedasr.training.sinks import Sink
from fedasr.training.stored import BEST_FOLDER
from fedasr.training.totals import Totals
from fedasr.training.trainers.central import train_seed
from fedasr.training.workdir import write_summary

_REPORT_SECONDS = 300.0  # that the run waits for its plots


def run_stages(session: Session, start: Any = None, only_seed: bool = False) -> dict[str, Any]:
    """All that is left to do of a run.

    Args:
      session: of the run.
      start: parameters in place of the seed's; None if there are none, or the run has begun.
      only_seed: train the seed, keep it for later runs, and end there.

    Returns:
      The summary, also in the session's folder; of a seed alone, what `seed_summary` says.

    Raises:
      UserError: only a seed is wanted, and there is none to be trained.
      Interrupted: the run was asked to stop; a checkpoint has all of it.
    """
    latest = session.latest
    stage, units = "seed", 0
    metadata = session.metadata
    if latest is not None:
        stage, units = metadata["stage"], metadata["units"]
        session.totals = Totals.of(metadata["totals"])
        session.initial = metadata["initial"]
    stream = None if hosts.is_leader() else io.StringIO()
    session.logger = RunLogger(
        session.logs,
        *_logged(session, stage, units),
        stream=stream,
        trackers=session.trackers if hosts.is_leader() else (),
        config=session.parts.config.tree(),
    )
    try:
        with session.logger, session.checkpointer:
            if latest is not None:
                order = _order_of_sums(session, metadata, latest)
                session.message(f"resuming in stage {stage!r} at {units}{order}")
            params = None
            if stage == "seed":
                params = train_seed(session, latest, units) if start is None else start
                if only_seed:
                    return summaries.of_seed(session, params)
                latest, units = None, 0
            summary = _main(session, params, latest, units, start, metadata.get("best"))
            if hosts.is_leader():
                summary["served"] = _served(session)
    except Interrupted:
        write_summary(session.logs, summaries.of_interrupted(session))
        raise
    write_summary(session.logs, summary)
    if hosts.is_leader() and (problem := make_report(session.logs)):
        summary["side_channel_failures"]["report"] = problem
        write_summary(session.logs, summary)
    return summary


def _order_of_sums(session: Session, metadata: Mapping[str, Any], number: int) -> str:
    """Whether a resumed run is the same bit for bit; "" for a checkpoint that does not say.

    Args:
      session: of the run; changes are kept in its totals.
      metadata: of the checkpoint.
      number: of the checkpoint.
    """
    if metadata.get("devices") is None:
        return ""
    begun = metadata["stage"] == "main" and metadata["units"]  # before that nothing is summed
    ours = exactness.here(session.parts.devices, session.trainer.chunk if begun else None)
    changes = exactness.changes(metadata, ours)
    if not changes:
        return f", exactly: on {ours['devices']} as before"
    session.totals.device_changes += [f"{change} at {number}" for change in changes]
    return f" with {', '.join(changes)}: {exactness.meaning(changes)}"


def _logged(session: Session, stage: str, units: int) -> tuple[int | None, int | None]:
    """(rounds, steps) that the log has seen; None for a start."""
    if session.latest is None:
        return None, None
    if stage == "seed":
        return -1, units  # not even round 0 (the evaluation before the first round) is done
    return session.trainer.logged(units, session.parts.seed_steps)


def _main(
    session: Session,
    params: Any,
    latest: int | None,
    units: int,
    start: Any,
    best: int | None,
) -> dict[str, Any]:
    """The main stage; then the summary."""
    parts = session.parts
    if parts.store is not None:
        parts.store.restore(units)
        if latest is not None:
            rows.check_rows(parts.store, session.checkpointer.directory / str(latest))
    if params is None:
        params = models.initial_params(parts.recogniser, parts.config)
    unit = "round" if parts.config.has_rounds else "step"
    session.begin_main(latest is not None, unit, best)
    if latest is None:
        session.initial = session.evaluate(params)
        session.message("before: " + summaries.wer_line(session.initial))
    state = session.trainer.train(session, params, latest, units)
    session.checkpointer.wait()
    state = session.selection.chosen(state)
    if parts.store is not None and session.selection.best is not None:
        session.refresh_rows = None
        best_round = session.selection.best[0]
        parts.store.restore(best_round, forget=False)
        rows.check_rows(parts.store, session.workdir / BEST_FOLDER / str(best_round))
    session.selection.close()
    return summaries.of_run(session, state, seeded=parts.seed_steps > 0 and start is None)


def _served(session: Session) -> dict[str, Any]:
    """Writes what was heard and the errors by user; their short form, {} if that cannot be done."""
    data, problems = session.parts.data, session.logger.failures
    found: dict[str, Any] = {}
    trained = [corpus for corpus in (data.spoken, data.seed) if corpus is not None]

    def write() -> None:
        found.update(
            served.write_served(
                session.logs, data.directory, data.evaluation, session.decoded, trained
            )
        )

    sink = Sink("errors by user", problems.__setitem__, _REPORT_SECONDS)
    sink(write)
    sink.close()
    if why := problems.get("errors by user"):
        session.message(f"warning: errors by user: {why}: they are not told")
        return {}
    return found


def make_report(workdir: Path) -> str:
    """Writes the report; returns what is wrong if it cannot be written, or takes too long."""
    problems: dict[str, str] = {}
    sink = Sink("report", problems.__setitem__, _REPORT_SECONDS)
    sink(write_report, workdir)
    if problems:
        say(f"warning: no report: {problems['report']}")
    return problems.get("report", "")
