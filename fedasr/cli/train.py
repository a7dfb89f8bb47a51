"""Trains a recogniser by federated learning, privately or not, or centrally.

    fedasr train [--config=NAME|FILE.py] [--workdir=DIR] [--config.section.field=value ...]
                 [--action=train|seed_only] [--dry_run [--target=v5e,h200]] [--json]
                 [--coordinator=HOST:PORT --processes=N --process=I]

With --coordinator the same command runs on several hosts, --process=0 on HOST; the work directory
and the data must be the same folders everywhere. --coordinator=auto: where JAX knows the cluster.

Without --config it is the quickstart. Running the same command again resumes; with --extend=ROUNDS
a run that is there, finished or not, goes on to more rounds. --action=seed_only trains the seed
alone and keeps it in .seeds beside the work directory, where runs with
--config.seed_training.reuse=True find it by its settings and data. --dry_run --target=v5e also
compiles the programs of its rounds for that accelerator, see `fedasr compile`. Exit status: 0 when
the work is done, 2 for a mistake that the user can mend, 3 when stopped by a signal (resumable).
"""

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fedasr.cli import common
from fedasr.cli.compile import measured, prepared, table
from fedasr.errors import UserError


def run() -> int | None:
    """Runs what the flags ask for; returns the exit status if not 0."""
    if flags.FLAGS.target and not flags.FLAGS.dry_run:
        raise UserError("--target is for --dry_run: a run trains on the devices that are here")
    chosen = prepared(flags.FLAGS.target) if flags.FLAGS.target else []
    common.configure_devices()
    common.keep_memory()
    if flags.FLAGS.coordinator:
        return common.in_step(
            flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process, train
        )
    if flags.FLAGS.processes is not None or flags.FLAGS.process is not None:
        raise UserError("--processes and --process need --coordinator")
    return train(chosen)


def train(chosen: Sequence[tuple[Any, int]] = ()) -> int | None:
    """The run, in this process; `chosen`: accelerators for whose compilers a dry run asks."""
    from fedasr.federated import hosts
    from fedasr.training import config as config_lib
    from fedasr.training import loop
    from fedasr.training.logging import say
    from fedasr.training.remote import copies, mirror
    from fedasr.training.remote.storage import is_remote
    from fedasr.training.workdir import local_path

    config = config_lib.resolve(common.plain_config())
    if flags.FLAGS.dry_run:
        summary = loop.dry_run(
            config, flags.FLAGS.workdir, flags.FLAGS.extend, flags.FLAGS.action == "seed_only"
        )
        rows = measured(config, chosen) if chosen else []
        if rows:
            summary["programs"] = [dataclasses.asdict(row) for row in rows]
        if hosts.is_leader():
            shown = [*_planned(summary), *(table(rows) if rows else [])]
            common.show(summary) if common.JSON.value else print("\n".join(shown))
        return None
    name = f"{config['name']}-{config_lib.fingerprint(config_lib.what(config))}"
    place = flags.FLAGS.workdir or str(Path("runs") / name)
    if is_remote(place):
        workdir = mirror.place_of(place)
        where = f"{place}, while it runs in {workdir}"
        common.configure_compilation(copies.copies_folder())
    else:
        workdir = local_path(place)
        where = place = str(workdir)
        common.configure_compilation(workdir.parent)
    if hosts.is_leader():
        say(f"work directory: {where}")
    only_seed = flags.FLAGS.action == "seed_only"
    try:
        command = shlex.join(["fedasr", "train", *sys.argv[1:]])
        summary = loop.run(config, place, flags.FLAGS.extend, only_seed, command, flags.FLAGS.track)
    except loop.Interrupted as stopped:
        return common.fail(stopped, common.STOPPED)
    if only_seed:
        if hosts.is_leader():
            common.show(summary)
        return None
    if hosts.is_leader():
        if common.JSON.value:
            common.show(summary)
        else:
            print("\n".join(_describe(summary)))
        say(f"report: {place.rstrip('/')}/report.html")
    return None if summary["status"] == "completed" else common.FAILED


def _describe(summary: dict) -> Iterator[str]:
    """The summary for people."""
    from fedasr.training import exactness
    from fedasr.training.logging import from_json

    summary = from_json(summary)
    yield f"{summary['name']}: {summary['status']}, {summary['parameters']:,} parameters"
    for split, wer in summary["wer"].items():
        yield f"{split} word error rate: {summary['initial_wer'][split]:.1f}% -> {wer:.1f}%"
    if selected := summary.get("selection"):
        yield (
            f"kept: {selected['units']} of {selected['of']} rounds or steps, the lowest error rate "
            f"on {selected['split']}" + (" (stopped early)" if selected["stopped_early"] else "")
        )
    for text in summary.get("warnings") or []:
        yield f"warning: {text}"
    yield from _privacy(summary)
    if skipped := summary["skipped_utterances"]:
        yield f"utterances skipped: {skipped}"
    if invalid := summary["invalid_client_updates"]:
        yield f"client updates that were not finite, counted as zero: {invalid}"
    if changes := summary.get("device_changes"):
        yield f"went on with {'; '.join(changes)}: {exactness.meaning(changes)}"
    yield f"{summary['wall_seconds']:.0f} s on {summary['device']}"


def _privacy(summary: dict) -> Iterator[str]:
    """Of a run, or of one that would be."""
    from fedasr.privacy import ledger
    from fedasr.privacy.accounting import epsilon_in_words

    privacy = summary["privacy"]
    if not privacy["enabled"]:
        yield "privacy: none (no clipping of client updates, no noise)"
        return
    yield (
        f"privacy as simulated: epsilon {epsilon_in_words(privacy['epsilon'])} at delta "
        f"{privacy['delta']:g} ({privacy['accountant']}), {summary['cohort']} of "
        f"{summary['population']} users expected in each of {summary['rounds']} rounds"
    )
    for case in privacy["extrapolations"]:
        yield (
            f"privacy as deployed with the same noise on the mean: epsilon "
            f"{epsilon_in_words(case['epsilon'])} ({case['accountant']}), "
            f"{case['cohort']:,} of {case['population']:,} users in each of {case['rounds']} "
            f"rounds{_otherwise(case['neighbours'], privacy['neighbours'])}"
        )
    yield f"epsilon compares: {privacy['neighbours']}"
    yield (
        f"noise: {privacy['noise']}, {privacy['noise_multiplier']:.4g} times the clip norm on "
        f"the sum of updates, {privacy['noise_over_sensitivity']:.4g} times what one user can "
        "change in it"
    )
    if adaptive := privacy.get("adaptive"):
        yield (
            f"clip bounds are adaptive (quantile {adaptive['quantile']:g} of the users' "
            f"norms); noise on the votes {adaptive['noise_multiplier']:.4g}, within epsilon"
        )
    yield (
        "the noise's tails end: what lies beyond them adds at most "
        f"{privacy['delta_at_tails']:.1g} to delta"
    )
    yield from ledger.in_words(privacy["ledger"] or {})
    yield f"not covered by these figures: {'; '.join(privacy['not_covered'])}"


def _planned(summary: dict) -> Iterator[str]:
    """What a run would be, for people."""
    from fedasr.training import config as config_lib
    from fedasr.training.logging import from_json, to_json
    from fedasr.training.workdir import flatten

    summary = from_json(summary)
    config = summary["config"]
    yield (
        f"{summary['name']}: would be trained ({summary['algorithm']}), "
        f"{summary['parameters']:,} parameters, {summary['population']} training users, "
        f"{summary['device']}"
    )
    if steps := config["seed_training"]["steps"]:
        yield f"a seed first: {steps} steps on {config['seed_training']['split']!r}, if it is there"
    if "rounds" in summary:
        yield f"{summary['rounds']} rounds with {summary['cohort']} users expected in each"
        for client in summary["clients"]:
            yield (
                f"a client receives {client['down_bytes'] / 1e6:.3g} MB a round and sends "
                f"{client['up_bytes'] / 1e6:.3g} MB ({client['method']})"
            )
        if local := summary.get("local"):
            yield f"of its own it keeps {local['parameters']:,} parameters"
        yield from _privacy(summary)
    else:
        yield f"{config['central']['steps']} steps of central training, without privacy"
    usual = flatten(to_json(config_lib.default_config().to_dict()))
    own = {name: value for name, value in flatten(config).items() if usual.get(name, ...) != value}
    yield "settings other than the defaults (--json prints all):"
    yield from (f"  {name}={value}" for name, value in sorted(own.items()))


def _otherwise(theirs: str, ours: str) -> str:
    return "" if theirs == ours else f"; there it compares: {theirs}"


def program() -> int | None:
    """Reads --config, then runs: a mistake in it is said before anything starts."""
    common.plain_config()
    return run()


def _define_flags() -> None:
    flags.DEFINE_string(
        "workdir", None, "Where the run lives; default runs/NAME-FINGERPRINT of the configuration."
    )
    flags.DEFINE_integer("extend", None, "Rounds that the run in --workdir goes on to.")
    flags.DEFINE_enum("action", "train", ["train", "seed_only"], "All of the run, or its seed.")
    flags.DEFINE_list("track", [], "Trackers to tell: wandb, mlflow, trackio; locally by default.")
    flags.DEFINE_bool("dry_run", False, "Train nothing: print what the run would be.")
    flags.DEFINE_list("target", [], "With --dry_run: also compile for v5e, h200, ...")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or 'auto'.")
    flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Which this is, from 0.", lower_bound=0)


def main() -> None:
    """The command `fedasr train`: parses the flags, runs and exits."""
    _define_flags()
    common.define_config("quickstart")
    common.main(program, __name__, urls=["workdir"])


if __name__ == "__main__":
    main()
