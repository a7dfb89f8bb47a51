"""Runs that start from a model that others trained: `init_from=hf:FOLDER`.

The folder makes the model's section of the configuration, so that a run that has begun knows its
model without it. `hf-encoder:FOLDER` takes all but the output layer, of which there is a new one
for the data's alphabet.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fedasr.errors import UserError
from fedasr.models.pretrained import FAMILIES, folders
from fedasr.models.pretrained.modules import ComputeConfig
from fedasr.models.recogniser import make_recogniser
from fedasr.streams import Stream, seed_key
from fedasr.text import Tokenizer, folder_tokenizer
from fedasr.training.config import Config
from fedasr.training.remote.copies import local
from fedasr.training.sections import Model
from fedasr.training.values import WHOLE, parse_start
from fedasr.training.workdir import read_existing

_COMPUTE = tuple(field.name for field in dataclasses.fields(ComputeConfig))


def is_pretrained(config: Config) -> bool:
    """Whether a run starts from a model that others trained."""
    return parse_start(config.init_from)[0] != ""


def resolved(config: Config, workdir: str | Path | None = None) -> Config:
    """A configuration whose model is the one that the run starts from; others as they are.

    Options of compute (`ComputeConfig`) are the configuration's, as are all that it gives for this
    family by name; the rest is the folder's.

    Args:
      config: of the run.
      workdir: where the model is known from, if the folder is no longer there; also a URL.

    Raises:
      UserError: see `folders.open_source`.
    """
    scheme, place = parse_start(config.init_from)
    if not scheme:
        return config
    if not Path(place).exists() and workdir is not None:
        existing = Config.of(read_existing(local(workdir)) or {})
        if existing.init_from == config.init_from:
            return dataclasses.replace(config, model=existing.model)
    source = folders.open_source(place, scheme == WHOLE)
    given = dict(config.model.options)
    if config.model.name != source.name:
        carried = (*_COMPUTE, *(() if source.head else ("vocab",)))
        given = {name: given[name] for name in carried if name in given}
    options = {**source.options, **given}
    make_recogniser(source.name, options)  # says what is wrong with them
    whole = dataclasses.asdict(FAMILIES[source.name].config(**options))
    return dataclasses.replace(config, model=Model(name=source.name, options=whole))


def read_params(config: Config, shapes: Any) -> Any:
    """The parameters that a resolved configuration's run starts from, float32.

    Args:
      config: of the run.
      shapes: of the model's parameters.

    Raises:
      UserError: see `folders.Source.params`.
    """
    scheme, place = parse_start(config.init_from)
    source = folders.open_source(place, scheme == WHOLE)
    options = config.model.options
    read = source.params(options, shapes)
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(read)}
    init, key = make_recogniser(source.name, options).init, seed_key(config.seed, Stream.INIT)

    def missing(key: jax.Array) -> Mapping[str, jax.Array]:
        drawn = jax.tree.leaves_with_path(init(key))
        names = [(jax.tree_util.keystr(path), x) for path, x in drawn]
        return {name: x for name, x in names if name not in flat}

    flat |= jax.jit(missing)(key)  # of a large model only what is kept is made
    return jax.tree.map_with_path(lambda path, _: flat[jax.tree_util.keystr(path)], shapes)


def check_tokenizer(config: Config, characters: str | list[str] | None) -> None:
    """Raises UserError for data that was not written with the tokenizer of the model's folder.

    Args:
      config: of a run that starts from one.
      characters: of the data; None if there is none yet.
    """
    scheme, place = parse_start(config.init_from)
    if scheme != WHOLE or characters is None:
        return
    folder = Path(place)
    if place.endswith(folders.SUFFIX):
        folder = folder.parent
    tokenizer: Tokenizer = folder_tokenizer(folder)
    if tokenizer.characters != characters:
        raise UserError(
            f"the data was not written with the tokenizer of {folder}: prepare it with "
            f"--tokenizer={folder}, or begin with a new output layer, init_from=hf-encoder:{place}"
        )
