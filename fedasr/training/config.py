"""The configuration of a run: frozen dataclasses, one a section, each field of which is a flag.

Fields are declared (`fedasr.training.sections`) with their default, range or choices, unit and
meaning; what a run may be given is checked against that (`check_fields`) before anything else looks
at it. Outside, in flags, files and `config.json`, a configuration is a tree of plain values;
`Config.of` and `Config.tree` turn one into the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from fedasr.errors import UserError
from fedasr.fields import (
    check,
    checked,
    choice,
    declared,
    defaults,
    parse,
    section,
    setting,
    text,
    unparse,
    whole,
)
from fedasr.training import values
from fedasr.training.sections import (
    Augment,
    Central,
    Checkpoint,
    Client,
    Compression,
    Data,
    Decoding,
    Evaluation,
    Local,
    Model,
    Partial,
    Participation,
    Peft,
    Privacy,
    SeedTraining,
    Selection,
    Server,
)

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# What a run adds to its configuration: the data's content hash and its alphabet, the hash of files
# that it decodes with, and that of the parameters that it started from.
RECORDED = {"data": ("identity", "characters", "knowledge"), "": ("start",)}
# How a run is kept, and not what it computes: it may change from one start of a run to the next.
HOW = ("checkpoint.every_seconds", "checkpoint.deadline")
# Options of models that a release removed, at the value which meant nothing.
_REMOVED = {"frozen_dtype": "float32"}
_RECORDED = (*RECORDED["data"], "vocabulary")


@dataclasses.dataclass(frozen=True)
class Config:
    """All of a run.

    Rounds, steps and users are counts, learning rates belong to optax optimisers named in
    `fedasr.federated.server.SERVER_OPTIMIZERS`.

    Attributes:
      start: no setting, but what a run records: the hash of the parameters that it started from, ""
        for its own; None if that is not known.
    """

    name: str = setting(
        text("default", r"(?!\.+$)[^\x00-\x1f/\\]{1,100}", "a name, without slashes")
    )
    # Random keys hold 32 bits of it: beyond, two seeds would be the same.
    seed: int = setting(whole(0, most=2**32 - 1))
    algorithm: str = setting(
        choice("federated", values.algorithms),
        'or "central": the same data with the users forgotten',
    )
    algorithm_options: Mapping[str, Any] = setting(
        checked(dict, values.check_numbers, "numbers by name"),
        "the algorithm's own, such as alpha; set in a file, there is nothing to override here",
    )
    rounds: int = setting(whole(100, most=100_000_000, unit="rounds"), 'unused by "central"')
    cohort: int = setting(whole(8, unit="users"), "expected in a round")
    chunk: int | str = setting(
        checked("auto", values.check_chunk, "whole number or 'auto'", "users"),
        'users vmapped together on a device; 0: the whole cohort; "auto": as many as its memory '
        "holds, but 1 on a CPU, where that is fastest",
    )
    devices: int = setting(whole(0, unit="devices"), "0: all; on a CPU, one for each core")
    model_devices: int = setting(
        whole(1, 1, unit="devices"),
        "so many train a client together, for models too large for one",
    )
    init_from: str = setting(
        checked("", values.check_start, "path"),
        "work directory, checkpoint or exported folder to start from; it replaces the seed. Or "
        "hf:FOLDER, a model that others trained, which makes the model's section; "
        "hf-encoder:FOLDER for all of it but a new output layer",
    )
    data: Data = section(Data)
    model: Model = section(Model)
    augment: Augment = section(Augment)
    seed_training: SeedTraining = section(SeedTraining)
    central: Central = section(Central)
    client: Client = section(Client)
    compression: Compression = section(Compression)
    partial: Partial = section(Partial)
    peft: Peft = section(Peft)
    local: Local = section(Local)
    participation: Participation = section(Participation)
    server: Server = section(Server)
    privacy: Privacy = section(Privacy)
    evaluation: Evaluation = section(Evaluation)
    decoding: Decoding = section(Decoding)
    selection: Selection = section(Selection)
    checkpoint: Checkpoint = section(Checkpoint)
    start: str | None = None

    @property
    def has_rounds(self) -> bool:
        """Whether clients train in rounds, by one of the federated algorithms."""
        return self.algorithm != values.CENTRAL

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Config:
        """The configuration that a tree of JSON values holds.

        Args:
          tree: that `check_fields` has passed, or one of an earlier release: what it lacks has its
            default. Sections of a program's own are left out.
        """
        found = parse(cls, tree)
        recorded = {name: tree.get("data", {}).get(name) for name in _RECORDED}
        data = dataclasses.replace(found.data, **recorded)
        options = {k: v for k, v in found.model.options.items() if _REMOVED.get(k) != v}
        model = dataclasses.replace(found.model, options=options)
        return dataclasses.replace(found, data=data, model=model, start=tree.get("start"))

    def tree(self) -> dict[str, Any]:
        """All of it as JSON holds it, with what was recorded: what `of` reads."""
        tree = unparse(self)
        for name in _RECORDED:
            if (value := getattr(self.data, name)) is not None:
                tree["data"][name] = value
        return tree if self.start is None else tree | {"start": self.start}

    def with_data(self, **changes: Any) -> Config:
        """The same with other fields of `data`."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, **changes))


def fields() -> dict[str, Any]:
    """The declarations: a `Field` for each leaf of the configuration."""
    return dict(declared(Config))


def default_config() -> ConfigDict:
    """Every field with its default; a recipe changes what it must.

    See `Config` for what they mean.
    """
    from ml_collections import ConfigDict, FieldReference

    config = ConfigDict(defaults(fields()))
    config.chunk = FieldReference("auto", field_type=object)
    config.lock()  # a misspelt field in a file is then an error
    for part in (config.server, config.central, config.seed_training):
        part.options.unlock()
    config.algorithm_options.unlock()
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
            given = {name: value for name, value in data.items() if name not in _RECORDED}
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


def what(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without `HOW`: two that differ there alone are the same run.

    Args:
      config: a tree.
    """
    sections = {name.split(".")[0] for name in HOW}
    return {
        name: {key: leaf for key, leaf in value.items() if f"{name}.{key}" not in HOW}
        if name in sections and isinstance(value, Mapping)
        else value
        for name, value in config.items()
    }


def fingerprint(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that name a configuration (a plain dict of JSON values)."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
