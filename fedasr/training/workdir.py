"""Whose a work directory is: one configuration's, whatever places it names and whenever it began.

What decides is the configuration that the checkpoints carry; without a checkpoint it is
`config.json`. Two are the same if they differ in places alone and what lies there is the same: data
is known by the hash of its metadata (`data.identity`), the parameters that a run starts from by the
hash of theirs (`start`).
"""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedasr.digests import START, params_digest
from fedasr.errors import UserError
from fedasr.fields import bucket
from fedasr.training.checkpoint import has_checkpoint, read_metadata, step_folders
from fedasr.training.config import HOW, Config, fingerprint
from fedasr.training.logging import from_json, to_json, write_json_atomic
from fedasr.training.stored import BEST_FOLDER, Unreadable

CONFIG_FILE, SUMMARY_FILE, COMMAND_FILE = "config.json", "summary.json", "command.txt"
# Where things lie; beside each, what they are.
PLACES = {
    "data.dir": "data.identity",
    "init_from": "start",
    "decoding.lm": "data.knowledge",
    "decoding.lexicon": "data.knowledge",
}
# Fields that releases added, with what older ones did: what lacks one is of such a release.
# Whatever is added to the declaration, or to a model's options, is to be added to these.
# A run's identity leaves them out while they hold what is said here: all that is random in it
# follows from its identity, which a field that is new must not change.
LATER: dict[str, Any] = {
    "algorithm_options": {},
    "data.skew": "",
    "data.skew_alpha": 0.0,
    "data.quantity_skew": 0.0,
    "participation.enabled": False,
    "participation.trace": "",
    "participation.seconds_per_step": 1.0,
    "participation.transfer_seconds": 0.0,
    "participation.spread": 0.0,
    "participation.jitter": 0.0,
    "participation.available": 1.0,
    "participation.diurnal": 0.0,
    "participation.round_hours": 0.1,
    "participation.dropout_before": 0.0,
    "participation.dropout_after": 0.0,
    "participation.deadline": 0.0,
    "participation.first": 0,
    "participation.concurrency": 0,
    "central.options": {},
    "central.decay_start": 0,
    "central.decay_smooth": False,
    "central.decay_linear": False,
    "seed_training.options": {},
    "seed_training.decay_start": 0,
    "seed_training.decay_smooth": False,
    "seed_training.decay_linear": False,
    "client.batch_buffer": 0,
    "decoding.blank_penalty": 0.0,
    "evaluation.published": False,
    "augment.options.inclusive": True,
    "augment.options.time_warp": 0.0,
    "augment.options.frequency_warp": 0.0,
    "model.options.branch_dropout": True,
    "model.options.front_end": "centred",
    "model.options.init": "third",
    "model.options.layer_drop_per": "part",
    "model.options.stream_dtype": "",
    "model.options.scan_blocks": False,
    "model.options.generator": "threefry",
    "model.options.recurrent_init": "gates",
    "model.options.initial_states": "all",
    "model.options.walk_axis": "time",
    "model.options.l2_on": "all",
    "model.options.taps": 0,
    "model.options.windows": "centred",
    "peft.kind": "full",
    "peft.rank": 8,
    "peft.alpha": 16.0,
    "peft.patterns": [],
    "peft.bottleneck": 32,
    "peft.also": [],
    "peft.frozen_dtype": "float32",
}
# Likewise, the newest first, of before that rule.
ADDED: dict[str, Any] = {
    **LATER,
    "decoding.name": "greedy",
    "decoding.lm": "",
    "decoding.lexicon": "",
    "decoding.order": 3,
    "decoding.beam": 32,
    "decoding.lm_weight": 1.0,
    "decoding.word_bonus": 0.0,
    "decoding.unknown_penalty": 6.0,
    "selection.split": "",
    "selection.patience": 0,
    "evaluation.every_steps": 100,
    "seed_training.reuse": False,
    "start": "",  # what init_from was, where a release did not note it
    "privacy.noise_seed": "run",
    "privacy.bits": 16,
    "data.labels_per_frame": 0.2,
    "data.resident": False,
    "model.options.attention": "plain",
    "model_devices": 1,
    "model.options.remat": "none",
    "client.micro_batch": 0,
    "local.patterns": [],
    "local.prototype": "init",
    "model.options.input_layer": False,
    "compression.download": "",
    "compression.upload": "",
    "compression.share": 0.9,
    "compression.align": True,
    "compression.measure": False,
    "partial.mode": "all",
    "partial.patterns": ["."],
    "partial.groups": 10,
    "partial.share": 0.1,
    "privacy.adaptive.warmup": 0,
    "privacy.adaptive.warmup_rate": 4.0,
}
# Likewise of a state: a leaf that a checkpoint lacks has the value with which a run would begin.
# The root of all that is random is made from the run; rounds before it had streams of their own.
STATE_ADDED = ("root",)


def local_path(workdir: str | Path) -> Path:
    """The path of a work directory on a file system.

    Raises:
      UserError: it is a bucket: `Path` would make a local folder of its name, which nobody looks
        for. What is in a bucket is worked on in a copy: `fedasr.training.remote.mirror`.
    """
    if wrong := bucket(str(workdir)):
        raise UserError(f"--workdir={workdir} {wrong}; a local folder of that name begins with ./")
    return Path(workdir)


@contextlib.contextmanager
def disk_errors(workdir: str | Path | None) -> Iterator[None]:
    """Turns what a disk does not do into a UserError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        what = error.strerror or " ".join(str(error).split())[:200]
        raise UserError(
            f"the run in --workdir={workdir} cannot go on: {what}{where}: what was saved is "
            "intact; mend that, and the same command goes on"
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file, or none that holds an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes a run's summary, with a check of it."""
    plain = to_json(summary)
    write_json_atomic(folder / SUMMARY_FILE, plain | {"check": fingerprint(plain)})


def read_summary(workdir: Path) -> tuple[dict[str, Any] | None, str]:
    """The summary in a work directory, and what is wrong if there is one that cannot be used.

    Returns:
      (None, "") without one; (None, a reason) if it is damaged, or of another run than the
      checkpoints beside it.
    """
    path = workdir / SUMMARY_FILE
    found = read_json(path)
    if found is None:
        return None, f"{path} is damaged" if path.exists() else ""
    check = found.pop("check", None)  # releases before 2026-12 wrote none
    if check is not None and check != fingerprint(found):
        return None, f"{path} is damaged"
    for folder in reversed(step_folders(workdir / "checkpoints")):
        try:
            metadata = read_metadata(folder)
        except Unreadable:
            continue
        runs = {entry["run"] for entry in (metadata.get("ledger") or {}).get("own") or []}
        if metadata["stage"] == "main" and found.get("run") and runs and found["run"] not in runs:
            return None, f"{path} is of another run than the checkpoints beside it"
        break
    return found, ""


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by "section.name"; empty mappings are leaves."""
    if isinstance(tree, Mapping) and tree:
        return {
            name: leaf
            for key, value in tree.items()
            for name, leaf in flatten(value, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: tree}


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Names of the fields in which two configurations are not the same.

    Args:
      theirs: as an older release may have written it.
      ours: of this release.
    """
    old, new = flatten(to_json(theirs)), flatten(to_json(ours))
    for name, value in ADDED.items():
        if name in new:
            old.setdefault(name, value)
    names = (old.keys() | new.keys()) - set(HOW)
    found = {name for name in names if old.get(name, _MISSING) != new.get(name)}
    if "data.characters" not in flatten(theirs):
        found.discard("data.characters")
    if "data.labels_per_frame" not in flatten(theirs):
        found.discard("data.buckets")  # it counted shapes that were fitted to the data
    for place, content in PLACES.items():
        unknown = content == "data.knowledge" and None in (old.get(content), new.get(content))
        if (content == "start" or unknown) and place not in found:
            found.discard(content)  # the same place: what was there when the run began counts
        elif old.get(content) and old.get(content) == new.get(content):
            found.discard(place)
    return sorted(found)


_MISSING = object()


def recorded_config(tree: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint carries, by whatever release: what it lacks is filled in.

    Args:
      tree: `config` of the checkpoint's metadata.
    """
    flat, options = flatten(tree), "model.options."
    lacking = {
        name: value
        for name, value in ADDED.items()
        if name not in flat and name != "start" and not name.startswith(options)
    }
    filled = copy.deepcopy(dict(tree))
    for name, value in lacking.items():
        *sections, leaf = name.split(".")
        inner = filled
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return Config.of(filled)


def identity(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name a configuration wherever its data lies."""
    flat = flatten(to_json(config))
    files = flat.get("data.knowledge") is not None  # without, these are names of splits
    left_out = {place for place in PLACES if files or not place.startswith("decoding.")} | set(HOW)
    return fingerprint({name: value for name, value in flat.items() if name not in left_out})


def start_hash(params: Any) -> str:
    """Sixteen hexadecimal digits that name the parameters that a run starts from."""
    return params_digest(params, START)[:16]


def read_existing(workdir: Path) -> dict[str, Any] | None:
    """The configuration whose run a directory holds; None if it holds none.

    Raises:
      UserError: `config.json` names another one than the checkpoints carry.
    """
    written = read_json(workdir / CONFIG_FILE)
    carried: list[tuple[Path, dict[str, Any]]] = []  # the newest first
    for folder in reversed(step_folders(workdir / "checkpoints")):
        try:
            config = read_metadata(folder).get("config")
        except Unreadable:
            continue  # damaged: the next older one counts, see `Checkpointer`
        if isinstance(config, dict):
            carried.append((folder, config))
    if not carried:
        return written
    newest, config = carried[0]
    if written is None:
        return config
    if not (other := _differing_in_kind(config, written)):
        return written
    if any(not _differing_in_kind(theirs, written) for _, theirs in carried[1:]):
        raise UserError(
            f"the checkpoint {newest} is of another run than {CONFIG_FILE} and the older "
            f"checkpoints (differs in {', '.join(other[:5])}): remove {newest} to go on from those"
        )
    raise UserError(
        f"{workdir / CONFIG_FILE} is not of the run whose checkpoints lie beside it (differs "
        f"in {', '.join(other[:5])}): remove that file to go on with the checkpoints' run"
    )


def _differing_in_kind(carried: Mapping[str, Any], written: Mapping[str, Any]) -> list[str]:
    """Fields in which `config.json` is of another run than a checkpoint.

    Not for its rounds, if they are more: an extension is written before the first checkpoint that
    carries it.
    """
    found = differing(carried, written)
    if "rounds" in found and _rounds(written) > _rounds(carried):
        found.remove("rounds")
    return found


def check_same(workdir: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises UserError unless a directory's configuration is the one to be run."""
    if found := differing(theirs, ours):
        more = ""
        if found == ["rounds"] and _rounds(theirs) < ours["rounds"]:
            more = f", or go on to more rounds by --extend={ours['rounds']}"
        raise UserError(
            f"--workdir={workdir} belongs to another configuration (differs in "
            f"{', '.join(found[:5])}): choose another directory{more}"
        )


def extended(workdir: Path, theirs: Mapping[str, Any] | None, ours: Config, rounds: int) -> Config:
    """The configuration of a run that goes on to more rounds.

    Everything random of a round is a function of the seed and the round's number, so a run that
    is extended ends as one that was made so. Not with correlated noise: its strategy is made for a
    number of rounds, and another number is another mechanism from the first round on.

    Args:
      workdir: for messages.
      theirs: of the directory.
      ours: of the command.
      rounds: to go on to.

    Raises:
      UserError: there is nothing to extend, or this cannot be.
    """
    if theirs is None:
        raise UserError(f"--extend: --workdir={workdir} holds no run yet: set --config.rounds")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 100_000_000:
        raise UserError(f"--extend={rounds} must be a number of rounds, 1 to 100000000")
    if not ours.has_rounds:
        raise UserError("--extend goes on with federated rounds: central training has none")
    if has_fixed_rounds(ours):
        raise UserError(
            f"--extend: privacy.noise={ours.privacy.noise!r} is made for its number of "
            "rounds, more are another mechanism: start anew with --config.rounds"
        )
    if rounds < _rounds(theirs):
        raise UserError(f"--extend={rounds}: the run already goes to round {_rounds(theirs)}")
    _check_best(workdir, ours, rounds)
    return dataclasses.replace(ours, rounds=rounds)


def has_fixed_rounds(config: Config) -> bool:
    """Whether a run is another one from its first round on if it has more of them."""
    return config.privacy.enabled and config.privacy.noise in ("banded", "buffered")


def _check_best(workdir: Path, config: Config, rounds: int) -> None:
    """Raises UserError if the best state is of a round that a longer run does not evaluate."""
    folder, every = workdir / BEST_FOLDER, config.evaluation.every
    if not config.selection.split or not has_checkpoint(folder):
        return
    try:
        chosen = read_metadata(folder)["selection"]["units"]
    except Unreadable:
        return  # it is lost, and `selection.Selection` says so
    if every and chosen < rounds and chosen % every:
        raise UserError(
            f"--extend={rounds}: the best state on {config.selection.split!r} is of round "
            f"{chosen}, where the shorter run ended; a run of {rounds} rounds looks at every "
            f"{every}th alone, and may keep another: start anew with --config.rounds={rounds}"
        )


def _rounds(config: Mapping[str, Any]) -> int:
    rounds = config.get("rounds")  # of a file, which may hold anything
    return rounds if isinstance(rounds, int) else 0


def history(summary: Mapping[str, Any] | None, rounds: int) -> list[dict[str, Any]]:
    """What a directory's earlier ends came to: rounds, error rates and epsilon of each.

    Args:
      summary: that lies there.
      rounds: that the run goes to now.
    """
    if not summary:
        return []
    summary = from_json(summary)
    kept = list(summary.get("history") or [])
    done = summary.get("rounds")
    if summary.get("status") == "completed" and isinstance(done, int) and done < rounds:
        privacy = summary.get("privacy") or {}
        kept.append(
            {
                "rounds": done,
                "wer": summary.get("wer"),
                "cer": summary.get("cer"),
                "epsilon": privacy.get("epsilon"),
            }
        )
    return kept
