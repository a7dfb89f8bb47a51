"""A whole run: data, seed, federated rounds, evaluation, checkpoints, summary and report.

A work directory holds one run. Running the same configuration again continues from the last
checkpoint and ends with the same parameters, bit for bit, since everything random is a function of
(seed, round, user) and the noise counter is part of the state.

Where things are: `builders` makes the objects of a configuration, `dry_run` all of them without
training, `session` and `stages` are a run that goes on, `trainers` the two kinds of training,
`summaries` and `describe` what is told of it.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedasr.data.records import read_metadata
from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.local import remove_rows
from fedasr.text import learned_vocabulary, tokenizer_for
from fedasr.training import stages, starts
from fedasr.training.builders import corpora, decoders, models, whole
from fedasr.training.checkpoint import Checkpointer, has_checkpoint, lock_directory
from fedasr.training.config import Config
from fedasr.training.dry_run import dry_run as dry_run
from fedasr.training.interrupts import StopFlag, graceful_stop
from fedasr.training.logging import say, write_json_atomic
from fedasr.training.remote import copies
from fedasr.training.remote.mirror import mirrored
from fedasr.training.remote.storage import is_remote
from fedasr.training.rows import LOCAL_FOLDER
from fedasr.training.session import Interrupted as Interrupted
from fedasr.training.session import Session, make_parts
from fedasr.training.trackers import check_trackers
from fedasr.training.trainer import Trainer
from fedasr.training.trainers.central import CentralTrainer
from fedasr.training.trainers.central_local import LocalCentralTrainer
from fedasr.training.trainers.federated import FederatedTrainer
from fedasr.training.workdir import (
    COMMAND_FILE,
    CONFIG_FILE,
    check_same,
    disk_errors,
    extended,
    history,
    identity,
    local_path,
    read_existing,
    read_json,
    read_summary,
    start_hash,
)

REPORT_FILE = "report.html"


def run(
    config: Mapping[str, Any] | Config,
    workdir: str | Path,
    extend: int | None = None,
    only_seed: bool = False,
    command: str = "",
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains as `config` says, from the last checkpoint in `workdir` if there is one.

    Args:
      config: a plain mapping with the fields of `default_config`, or a `Config`.
      workdir: made if missing; a path, or a URL in cloud storage (`fedasr.training.remote`).
      extend: rounds to go on to instead of the configuration's, in a directory that holds a run.
      only_seed: end with the seed, which is kept for later runs (`seed_training.reuse`).
      command: that asked for it, which the report names; kept in `workdir/command.txt`.
      trackers: of others that are told its metrics, by name (`fedasr.training.trackers`).

    Returns:
      The summary, also in `workdir/summary.json`; of a seed, `fedasr.training.summaries.of_seed`.

    Raises:
      UserError: for a mistake in the configuration or data, no seed where only that is wanted, a
        `workdir` of another configuration, or a disk or storage that does not take what must not
        be lost.
      Interrupted: on SIGTERM or SIGINT, after saving a checkpoint.
    """
    copies.refresh()
    if is_remote(workdir):
        config = whole.checked(config, workdir)  # mistakes first
        whole.check_remote(config, only_seed)
        with mirrored(str(workdir), _set_aside) as mirror:
            return _run(
                config, mirror.folder, extend, only_seed, command, trackers, sent=mirror.push
            )
    return _run(config, local_path(workdir), extend, only_seed, command, trackers)


def _run(
    config: Mapping[str, Any] | Config,
    workdir: Path,
    extend: int | None,
    only_seed: bool,
    command: str,
    trackers: Sequence[str],
    sent: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """See `run`; `sent` is called after each checkpoint that was read back."""
    config = whole.checked(config, workdir)
    check_trackers(trackers)
    if only_seed:
        config = _for_seed_only(config)
    with disk_errors(workdir), contextlib.ExitStack() as stack:
        starts.check_there(config, workdir)
        config, directory = _record_data(config)
        _occupy(workdir, stack)
        stop = stack.enter_context(graceful_stop())
        hosts.wait_for_all("locked")
        config, start = _claim(config, workdir, extend)
        before, wrong = read_summary(workdir)
        if wrong and hosts.is_leader():
            say(f"warning: {wrong}: it is made again")
        if before and _is_done(before, config) and not only_seed:
            if hosts.is_leader() and not (workdir / REPORT_FILE).exists():  # killed between the two
                stages.make_report(workdir)
            return before
        # Rows without a checkpoint are of a mistake, or of a run that begins anew.
        if not has_checkpoint(workdir / "checkpoints") and hosts.is_leader():
            if models.local_layout(config) is not None:
                remove_rows(workdir / LOCAL_FOLDER)
        logs = workdir
        if not hosts.is_leader():
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        session = _begin(config, directory, workdir, logs, stop)
        if only_seed:
            _check_seed(session)
        session.trackers = trackers
        if sent is not None and isinstance(session.checkpointer, Checkpointer):
            session.checkpointer.sent = sent
        session.history = history(before, config.rounds) or session.metadata.get("history", [])
        # Before anything is written all have read, and the same.
        hosts.wait_for_all("begun")
        hosts.check_alike("configuration, data or work directory", f"{config} {session.latest}")
        hosts.connect()
        # Not before: a mistake must not claim the directory.
        if hosts.is_leader() and read_json(workdir / CONFIG_FILE) != config.tree():
            write_json_atomic(workdir / CONFIG_FILE, config.tree())
        if hosts.is_leader() and command:
            with contextlib.suppress(OSError):
                (workdir / COMMAND_FILE).write_text(command + "\n", "utf-8", "surrogateescape")
        summary = stages.run_stages(session, start, only_seed)
        hosts.wait_for_all("ended")  # who leaves before would end the others
        return summary


def _set_aside(workdir: Path) -> bool:
    """Sets aside the checkpoints that cannot be read; whether there were any."""
    if not has_checkpoint(workdir / "checkpoints"):
        return False
    with Checkpointer(workdir / "checkpoints") as opened:
        for folder, why in opened.damaged.items():
            say(f"warning: {why}; it was set aside as {folder.name}")
    return bool(opened.damaged)


def _occupy(workdir: Path, stack: contextlib.ExitStack) -> None:
    """Makes a work directory and keeps others out of it, as long as the stack lasts."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --workdir={workdir}: {error.strerror}") from error
    if hosts.is_leader():
        lock = stack.enter_context(lock_directory(workdir))
        if lock.warning:
            say(lock.warning)


def _for_seed_only(config: Config) -> Config:
    """Raises UserError for a configuration that trains no seed."""
    whole.check_seed(config)
    return dataclasses.replace(
        config, seed_training=dataclasses.replace(config.seed_training, reuse=True)
    )


def _check_seed(session: Session) -> None:
    """Raises UserError for data without a seed's split, or a run that is beyond its seed."""
    if not session.parts.seed_steps:
        raise UserError(
            f"--action=seed_only: {session.parts.data.directory} has no split "
            f"{session.parts.config.seed_training.split!r}: give some users that split"
        )
    if session.latest is not None and session.metadata["stage"] != "seed":
        raise UserError(
            f"--action=seed_only: the run in {session.workdir} is beyond its seed: choose another "
            "--workdir"
        )


def _record_data(config: Config) -> tuple[Config, Path]:
    """The configuration that names its data's content and alphabet, and the data's folder."""
    if hosts.is_leader():
        corpora.data_directory(config)  # the others find it made
    hosts.wait_for_all("data")
    directory = corpora.data_directory(config)
    identity = corpora.content_hash(directory)
    metadata = read_metadata(directory)
    config = config.with_data(
        identity=identity,
        # What the model's outputs mean: of the checkpoints, too.
        characters=tokenizer_for(metadata).characters,
        vocabulary=learned_vocabulary(metadata) or None,
        knowledge=decoders.knowledge_hash(config.decoding),
    )
    return config, directory


def _claim(config: Config, workdir: Path, extend: int | None) -> tuple[Config, Any]:
    """The configuration with its start, and the start's parameters.

    Raises:
      UserError: the directory is another run's, or there is no such start.
    """
    existing = read_existing(workdir)
    if extend is not None:
        config = extended(workdir, existing, config, extend)
    start = starts.read_start(config, existing, workdir)
    named = start_hash(start) if start is not None else (existing or {}).get("start")
    config = dataclasses.replace(config, start=named or "")
    if existing is not None:
        rounds = {} if extend is None else {"rounds": extend}
        check_same(workdir, {**existing, **rounds}, config.tree())
    return config, start


def _begin(config: Config, directory: Path, workdir: Path, logs: Path, stop: StopFlag) -> Session:
    parts = make_parts(config, directory, workdir)
    trainer: Trainer
    if config.has_rounds:
        trainer = FederatedTrainer(parts, workdir)
    elif parts.store is not None:
        trainer = LocalCentralTrainer(parts)
    else:
        trainer = CentralTrainer(parts)
    return Session(parts, trainer, workdir, logs, stop)


def _is_done(summary: Mapping[str, Any], config: Config) -> bool:
    """Whether a summary is that of the whole of this run."""
    if summary.get("status") != "completed":
        return False
    ours = identity(config.tree())
    if summary.get("configuration", ours) != ours:
        return False
    if (summary.get("selection") or {}).get("stopped_early"):
        return True
    return not config.has_rounds or summary.get("rounds") == config.rounds
