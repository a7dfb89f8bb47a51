"""A trained recogniser as a folder, or a file, for others to use; with a model card.

A format is a function in this package's terms (see `Format`) and a line in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedasr
from fedasr.data.records import read_metadata as read_corpus_metadata
from fedasr.errors import UserError
from fedasr.models import peft
from fedasr.models.pretrained import folders
from fedasr.models.recogniser import takes_audio
from fedasr.text import PHONEMES, SILENCE
from fedasr.training import card, exported
from fedasr.training.builders import clients
from fedasr.training.checkpoint import read_metadata, restore_params
from fedasr.training.config import Config
from fedasr.training.logging import to_json
from fedasr.training.values import WHOLE, parse_start
from fedasr.training.workdir import recorded_config

_BESIDE = {".json", ".txt", ".model"}  # of a folder's files: configuration and tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """What is exported.

    Attributes:
      config: of the run; of an adapted model whose factors were merged, with `peft.kind` "full".
      params: nested dicts of numpy arrays, float32.
      metadata: of the checkpoint.
      alphabet: `options` from which `fedasr.text.tokenizer_for` makes its tokenizer.
      card: the model card, Markdown.
    """

    config: Config
    params: Any
    metadata: dict[str, Any]
    alphabet: dict[str, Any]
    card: str


Format = Callable[[Model, Path], None]  # writes into a folder that is there, and empty


def read_model(path: str | Path, merge: bool = True) -> Model:
    """A trained model with its card.

    Args:
      path: as for `fedasr.training.checkpoint.restore_params`.
      merge: whether factors of an adaptation become part of the base's matrices.

    Raises:
      UserError: there is no model; or its adaptation cannot be merged (`merge=False` keeps it).
    """
    metadata, params = read_metadata(path), restore_params(path)
    config = recorded_config(metadata.get("config", {}))
    adaptation = clients.peft_config(config)
    said = card.text(config, metadata, Path(path), params)
    if merge and adaptation.kind != "full":
        params = peft.merged(params, adaptation)
        config = dataclasses.replace(config, peft=type(config.peft)())
    return Model(config, params, metadata, alphabet_of(config, metadata), said)


def alphabet_of(config: Config, metadata: dict[str, Any]) -> dict[str, Any]:
    """What `tokenizer_for` needs; subword tokenizers are read from the prepared data.

    Raises:
      UserError: subwords, and the data is not there.
    """
    if carried := metadata.get("alphabet"):
        return dict(carried)
    characters: Any = config.data.characters
    directory = Path(config.data.dir) if config.data.dir else None
    if directory is not None and directory.exists():
        options = read_corpus_metadata(directory)["options"]
        names = ("characters", "subwords")
        return {name: options[name] for name in names if options.get(name)}
    phonemes = [*PHONEMES, SILENCE]
    if not isinstance(characters, str | None) and list(characters) != phonemes:
        raise UserError(
            "the model writes subwords, and the prepared data that has their tokenizer is not "
            f"there ({config.data.dir}): put it back to export"
        )
    return {"characters": characters}


def export(path: str | Path, out: str | Path, name: str = "fedasr", merge: bool = True) -> None:
    """Writes a trained model into a new folder.

    Args:
      path: of a work directory or checkpoint.
      out: folder to make.
      name: of `FORMATS`.
      merge: see `read_model`.

    Raises:
      UserError: no such model or format, a folder that is not empty, or a format that cannot hold
        this model.
    """
    if name not in FORMATS:
        raise UserError(f"--format={name}: choose one of {', '.join(FORMATS)}")
    model, folder = read_model(path, merge), Path(out)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out={folder} is not empty: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        FORMATS[name](model, folder)
        (folder / exported.CARD).write_text(model.card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {error.strerror or error}") from error


def _own(model: Model, folder: Path) -> None:
    """The project's own format, which `init_from`, `evaluate` and `transcribe` read."""
    arrays = exported.flat(model.params)
    exported.safetensors().save_file(arrays, folder / exported.WEIGHTS)
    tree = model.config.tree()
    # Where things lay is nobody's business, nor of use elsewhere.
    tree["data"]["dir"], tree["init_from"] = "", ""
    content: dict[str, Any] = {
        "format": exported.FORMAT,
        "version": exported.VERSION,
        "fedasr": fedasr.__version__,
        "shapes": {path: list(value.shape) for path, value in arrays.items()},
        "alphabet": model.alphabet,
        "config": tree,
        "ledger": _without_names(model.metadata.get("ledger")),
        **{name: model.metadata[name] for name in ("stage", "units") if name in model.metadata},
    }
    text = json.dumps(to_json(content), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / exported.CONFIG).write_text(text, encoding="utf-8")


def _without_names(ledger: dict[str, Any] | None) -> dict[str, Any] | None:
    """A ledger that says how many users it is about, but not whom: hashes could be recognised."""
    if ledger is None:
        return None

    def entries(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        nobody: dict[str, Any] = {"digest": "", "hashes": None}
        return [{**entry, "users": {**entry["users"], **nobody}} for entry in found]

    return {**ledger, **{name: entries(ledger[name]) for name in ("earlier", "own")}}


def _hugging_face(model: Model, folder: Path) -> None:
    """A folder that `transformers` loads: the start's own, with these weights."""
    config = model.config
    if not takes_audio(config.model.name):
        raise UserError(
            f"--format=huggingface is for models that came from there: {config.model.name!r} did "
            "not (--format=fedasr holds every model)"
        )
    scheme, place = parse_start(config.init_from)
    source = Path(place) if Path(place).is_dir() else Path(place).parent
    if scheme != WHOLE or not (source / exported.CONFIG).is_file():
        raise UserError(
            "--format=huggingface takes configuration and tokenizer from the folder that the run "
            f"started from, as a whole (init_from=hf:FOLDER), which {config.init_from!r} is not"
        )
    folders.write_tensors(config.model.name, config.model.options, model.params, folder)
    for file in sorted(source.iterdir()):
        if file.suffix in _BESIDE and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def _onnx(model: Model, folder: Path) -> None:
    """See `fedasr.training.onnx`."""
    from fedasr.training import onnx

    onnx.write(model.config, model.params, model.alphabet, folder)


FORMATS: dict[str, Format] = {"fedasr": _own, "huggingface": _hugging_face, "onnx": _onnx}
