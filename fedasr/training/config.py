"""The configuration of a run: one tree of fields, each of which a flag can override.

`fields` declares them, each with its default, its range or choices and its unit; what a run may be
given is checked against that (`check_fields`) before anything else looks at it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from fedasr.errors import UserError
from fedasr.fields import (
    Spec,
    check,
    checked,
    choice,
    defaults,
    flag,
    is_number,
    real,
    several,
    text,
    whole,
)

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_NEVER = 1_000_000_000  # a round that no run gets to
_MOST_RATE = 1e4  # of learning: two decades more than any optimiser here has been of use at
# What a run adds to its configuration: the data's content hash and its alphabet, and the hash of
# the parameters that it started from.
RECORDED = {"data": ("identity", "characters"), "": ("start",)}


def _optimizers() -> list[str]:
    from fedasr.federated.server import SERVER_OPTIMIZERS

    return list(SERVER_OPTIMIZERS)


def _models() -> list[str]:
    from fedasr.models.recogniser import model_configs

    return list(model_configs())


def _tasks() -> list[str]:
    from fedasr.data.synthetic import tasks

    return tasks()


def _prototypes() -> list[str]:
    from fedasr.federated.local import PROTOTYPES

    return list(PROTOTYPES)


def _chunk(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1_000_000
    return None if good or value == "auto" else "must be a number from 0, or 'auto'"


def _split(value: Any) -> str | None:
    from fedasr.data.splits import can_open

    if not isinstance(value, str):
        return "must be the name of a split"
    try:
        can_open(value, ())
    except UserError as error:
        return f"is no split: {error}"
    return None


def _format(value: Any) -> str | None:
    from fedasr.compression.formats import FloatFormat

    if not isinstance(value, str):
        return "must be the name of a float format"
    try:
        FloatFormat.parse(value) if value else None
    except UserError as error:
        return f"is no float format: {error}"
    return None


def _pattern(value: Any) -> str | None:
    if not isinstance(value, str) or not value:
        return "must be a regular expression"
    try:
        re.compile(value)
    except re.error as error:
        return f"is no regular expression: {error}"
    return None


def _deployment(value: Any) -> str | None:
    good = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    if not good or not 0 < value[0] <= value[1] <= 1e12:
        return "is not (cohort, population)"
    return None if value[1] == math.floor(value[1]) else "must have whole users in its population"


def _options(value: Any) -> str | None:
    """Options of an optimiser or model, by name; what they mean is for these to check."""
    if not isinstance(value, Mapping):
        return "must be options by name"
    for name, option in value.items():
        if not isinstance(option, bool | str) and not is_number(option):
            return f"has {name}={option!r}, which must be a finite number, a name, True or False"
    return None


def fields() -> dict[str, Any]:
    """The declaration: a `Field` for each leaf of the configuration.

    Rounds, steps and users are counts, `sigma` and `clip_norm` are as in arXiv 2310.00098
    (noise of std clip_norm * sigma on the mean client update), learning rates belong to optax
    optimisers named in `fedasr.federated.server.SERVER_OPTIMIZERS`.
    """
    from fedasr.audio.augment import SpecAugmentConfig
    from fedasr.models.transformer import TransformerConfig
    from fedasr.privacy.secure_aggregation import MAX_BITS, MIN_BITS

    central: Spec = {
        "steps": whole(0, most=100_000_000, unit="steps"),
        "batch_size": whole(16, 1, 65_536, "utterances"),
        # Audio in a batch; above 0 it replaces batch_size.
        "batch_seconds": real(0.0, most=1e6, unit="seconds"),
        "optimizer": choice("adamw", _optimizers),
        "learning_rate": real(1e-3, most=_MOST_RATE),
        "decay_steps": whole(0, unit="steps"),  # every so many times decay_rate; 0: constant
        "decay_rate": real(0.5, above=0, most=1),
        "grad_clip": real(1.0, above=0, most=1e12),
    }
    return {
        "name": text("default", r"(?!\.+$)[^\x00-\x1f/\\]{1,100}", "a name, without slashes"),
        # Random keys hold 32 bits of it: beyond, two seeds would be the same.
        "seed": whole(0, most=2**32 - 1),
        # Or "central": the same data with the users forgotten.
        "algorithm": choice("federated", ("federated", "central")),
        "rounds": whole(100, most=100_000_000, unit="rounds"),  # unused by "central"
        "cohort": whole(8, unit="users"),  # expected in a round
        # Users vmapped together on a device; 0: the whole cohort; "auto": as many as its memory
        # holds, but 1 on a CPU, where that is fastest.
        "chunk": checked("auto", _chunk, "whole number or 'auto'", "users"),
        "devices": whole(0, unit="devices"),  # 0: all; on a CPU, one for each core
        # So many train a client together, for models too large for one.
        "model_devices": whole(1, 1, unit="devices"),
        # Work directory or checkpoint to start from; it replaces the seed.
        "init_from": text(""),
        "data": {
            "dir": text(""),  # a prepared corpus; "": the synthetic one, made when first needed
            "task": choice("digits", _tasks),  # the synthetic corpus's
            "train": checked("train", _split, "split"),
            "eval": several(("dev", "test"), _split, what="splits"),
            # Padded lengths of clients' batches to each doubling: the same whatever the data is
            # (see `fedasr.data.batching.Grid`). Those that occur are compiled.
            "buckets": whole(2, 1, 64),
            # Room in padded batches; who needs more is padded as longer.
            "labels_per_frame": real(0.2, above=0, most=10),
            # Clients' examples are read once and kept on every device: for corpora that fit there.
            "resident": flag(False),
            # IID control: utterances dealt out afresh over the users, whose numbers are kept.
            "iid": flag(False),
            # Training users, for --dry_run before the data is there.
            "population": whole(0, unit="users"),
        },
        "model": {
            "name": choice("transformer", _models),
            # Fields of the model's configuration class; a file for another model replaces them.
            "options": checked(dataclasses.asdict(TransformerConfig()), _options, "options"),
        },
        "augment": {
            "enabled": flag(False),
            # Federated rounds done before SpecAugment begins.
            "start_round": whole(0, unit="rounds"),
            "options": checked(dataclasses.asdict(SpecAugmentConfig()), _options, "options"),
        },
        # Central training before the federated rounds, on its own split; steps 0: none.
        "seed_training": {"split": checked("seed", _split, "split"), **central},
        # The central baseline, when algorithm is "central".
        "central": central | {"steps": whole(500, most=100_000_000, unit="steps")},
        "client": {
            "optimizer": choice("sgd", _optimizers),
            "learning_rate": real(0.3, most=_MOST_RATE),
            "decay_start": whole(_NEVER, unit="rounds"),  # at the constant rate, then
            "decay_rounds": whole(500, 1, unit="rounds"),  # times decay_rate every so many
            "decay_rate": real(0.6, above=0, most=1),
            "batch_size": whole(4, 1, 65_536, "utterances"),
            # Audio in a batch; above 0 it replaces batch_size.
            "batch_seconds": real(0.0, most=1e6, unit="seconds"),
            "steps": whole(4, most=1_000_000, unit="steps"),  # 0: use epochs
            "epochs": whole(0, most=1_000_000, unit="passes"),  # 0: use steps
            "max_steps": whole(0, unit="steps"),  # with epochs, at most so many; 0: no limit
            # Utterances computed together; above 0 a batch's gradient is summed over parts of at
            # most so many utterances of like length. Their shapes are compiled into one program for
            # each doubling of the users' longest utterances; with data.buckets=4 they are 15.
            "micro_batch": whole(0, most=65_536, unit="utterances"),
            "grad_clip": real(1.0, above=0, most=1e12),
            "proximal": real(0.0),  # FedProx's mu
            # Or "examples", without privacy only.
            "weighting": choice("uniform", ("uniform", "examples")),
        },
        # Online model compression: float formats such as "S1E3M7" or "bfloat16"; "": float32.
        "compression": {
            "download": checked("", _format, "float format"),  # of what clients receive and keep
            "upload": checked("", _format, "float format"),  # of their updates
            "share": real(0.9, most=1),  # of the weight matrices, drawn by every client and round
            # Scale variables to the format's range; False: the paper's.
            "align": flag(True),
            # Measure a client's peak memory on its compiled program (for FedSGD; takes a while).
            "measure": flag(False),
        },
        # Partial model training: "all" variables, or a subset that is "fixed" by patterns, or drawn
        # for every "round" (one of so many groups) or for every "user" (a share).
        "partial": {
            "mode": choice("all", ("all", "fixed", "round", "user")),
            # Regular expressions, searched for in paths.
            "patterns": several((".",), _pattern, 1, "regular expressions"),
            "groups": whole(10, 1, 1_000_000),
            "share": real(0.1, above=0, most=1),
        },
        # Local parameters (federated only): variables that belong to each user, are trained with
        # the rest, and are never sent, summed or covered by the privacy.
        "local": {
            # Regular expressions, searched for in paths: ("^input_layer/",).
            "patterns": several((), _pattern, what="regular expressions"),
            # What a new user starts from: "init", the model's; without privacy also the "mean" of
            # the other users', or that of the "last" user before in the corpus's order.
            "prototype": choice("init", _prototypes),
        },
        "server": {
            "optimizer": choice("lamb", _optimizers),
            # Optax's own for this optimiser, such as b1; set in a file, there is nothing to
            # override here.
            "options": checked({}, _options, "options"),
            "learning_rate": real(0.01, most=_MOST_RATE),
            "decay_start": whole(_NEVER, unit="rounds"),  # at the constant rate, then
            "decay_rounds": whole(500, 1, unit="rounds"),  # times decay_rate every so many
            "decay_rate": real(0.6, above=0, most=1),
        },
        "privacy": {
            "enabled": flag(True),  # False: no clipping of client updates, no noise
            "clip_norm": real(0.01, above=0, most=1e9),
            # Per layer: "uniform" or "dim"; or one "global" clip.
            "budget": choice("uniform", ("uniform", "dim", "global")),
            # False: clip; True: rescale every layer as the paper's public code does.
            "normalise": flag(False),
            "sigma": real(1e-5),
            # "fixed": so many without replacement; "shuffled": in turn; "everyone": cohort=0.
            "sampler": choice("poisson", ("poisson", "fixed", "shuffled", "everyone")),
            # Largest Poisson cohort; 0: so many that a round is hardly ever full.
            "slots": whole(0, unit="users"),
            "cycle": whole(1, 1),  # groups of users that Poisson sampling takes in turn
            # "independent" from round to round, or correlated: "banded" or "buffered" (linear
            # Toeplitz); or "skellam": integers, in shares that clients add themselves, for secure
            # aggregation.
            "noise": choice("independent", ("independent", "banded", "buffered", "skellam")),
            # Of a coordinate that a client sends, with "skellam".
            "bits": whole(16, MIN_BITS, MAX_BITS, "bits"),
            # "run": all that is random follows from the run, and whoever has its configuration,
            # data and start can compute the noise; "secret": from the operating system, kept in
            # checkpoints alone.
            "noise_seed": choice("run", ("run", "secret")),
            # 0: as many as rounds lie between a user's turns, at most 32.
            "bands": whole(0, most=10_000, unit="rounds"),
            "buffers": whole(2, 1, 10),
            "adaptive": {  # bounds that follow a quantile of the update norms
                "enabled": flag(False),
                "quantile": real(0.5, above=0, below=1),
                "rate": real(0.2, above=0, most=10),
                # Rounds at first that move the bounds alone, and fast.
                "warmup": whole(0, unit="rounds"),
                "warmup_rate": real(4.0, above=0, most=10),
                # Noise on the mean of the users' votes over what one user changes in their sum.
                "sigma": real(0.1),
            },
            "delta": real(1e-9, above=0, below=1),
            # Deployments that the run stands for: (cohort, population) with the same sigma.
            "deployments": several(((1024, 1_000_000),), _deployment, what="pairs"),
        },
        "evaluation": {
            "every": whole(10, unit="rounds"),  # 0: only before and after
            "batch_size": whole(32, 1, 65_536, "utterances"),
            "while_training": several(("dev",), _split, what="splits"),
        },
        "checkpoint": {
            "every": whole(10, 1, unit="rounds"),
            "seed_every": whole(100, unit="steps"),  # of central training
            "keep": whole(2, 1, 100_000),
        },
    }


def default_config() -> ConfigDict:
    """Every field with its default; a recipe changes what it must.

    See `fields` for what they mean.
    """
    from ml_collections import ConfigDict, FieldReference

    config = ConfigDict(defaults(fields()))
    config.chunk = FieldReference("auto", field_type=object)
    config.lock()  # a misspelt field in a file is then an error
    config.server.options.unlock()
    return config


def check_fields(config: Any) -> None:
    """Raises UserError unless every field is there and holds what it may hold, and no other is.

    That is, each by itself; what fits together, and to the data, is for `fedasr.training.loop` to
    say. The names of model and optimiser options are checked by what takes them.

    Args:
      config: values as they were given: after `to_json` a NaN is a null.
    """
    if isinstance(config, Mapping):
        config = {name: value for name, value in config.items() if name not in RECORDED[""]}
        if isinstance(data := config.get("data"), Mapping):
            given = {name: value for name, value in data.items() if name not in RECORDED["data"]}
            config["data"] = given
    check(config, fields())


def resolve(config: Mapping[str, Any], own: Collection[str] | None = ()) -> dict[str, Any]:
    """A configuration as JSON holds it, checked before it is.

    Args:
      config: values as they were given.
      own: sections of the program's own, in which numbers have to be finite; None if all are.

    Raises:
      UserError: see `check_fields`, or for a number that is not finite.
    """
    from fedasr.training.logging import to_json

    own = config.keys() if own is None else own
    if shared := {name: value for name, value in config.items() if name not in own}:
        check_fields(shared)
    for name in own:
        _check_finite(config[name], name)
    return to_json(config)


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_finite(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value} must be a finite number")


def fingerprint(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that name a configuration (a plain dict of JSON values)."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
