"""A pretrained model as it lies on disk: its configuration, its tensors, and what is wrong."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedasr.errors import UserError, pass_exhaustion
from fedasr.models.pretrained import mapping, nemo
from fedasr.models.pretrained.family import Family
from fedasr.models.pretrained.registry import FAMILIES

CONFIG = "config.json"
_BESIDE = ("preprocessor_config.json", "generation_config.json")
OWN = "fedasr"  # in config.json: options that this project wrote
SUFFIX, INDEX = ".safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk whose weights are not read yet.

    Attributes:
      place: as the user named it. folder: of configuration and tokenizer.
      name: of its family. options: of the model, by name.
      head: whether its output layer is taken. tensors: from a tensor's name to what reads it.
    """

    place: str
    folder: Path
    name: str
    options: Mapping[str, Any]
    head: bool
    tensors: Mapping[str, Callable[[], np.ndarray]]

    @property
    def family(self) -> Family:
        """Its family."""
        return FAMILIES[self.name]

    def params(self, options: Mapping[str, Any], shapes: Any) -> dict[str, Any]:
        """Its parameters, nested dicts of float32 arrays; without the head's if that is not taken.

        Args:
          options: of the model that is to be, its own or with other compute or vocabulary.
          shapes: of that model's parameters.

        Raises:
          UserError: a tensor is missing, misshapen, not finite or of no use here.
        """
        config = self.family.config(**options)
        table, tensors = self.family.table(config, self.head), self.tensors
        try:
            self._check_used(table)
            found = mapping.to_params(table, list(tensors), lambda name: tensors[name](), shapes)
        except UserError as error:
            raise UserError(f"{self.place}: {error}") from error
        return found

    def _check_used(self, table: list[mapping.Entry]) -> None:
        """Raises UserError for a tensor that would change what the model computes."""
        there = set(self.tensors)
        used = mapping.spelled({name for entry in table for name in entry.names}, there)
        unused = [*self.family.unused, r"num_batches_tracked$"]
        if not self.head:
            unused.append(self.family.head)
        for name in sorted(there - used):
            if not any(re.search(pattern, name) for pattern in unused):
                raise UserError(
                    f"the tensor {name} has no place in this model: it is another, or has been "
                    "changed; merge adapters into it before"
                )


def open_source(place: str | Path, head: bool = True) -> Source:
    """Looks at a model: reads its configuration, not its weights.

    Args:
      place: a folder with config.json and safetensors, such a file in one, or an archive of NeMo.
      head: whether its output layer is wanted; False for a new one.

    Raises:
      UserError: there is none, of a kind that is not known, without the output layer that is
        wanted, or damaged.
    """
    path = Path(place)
    folder = path.parent if path.name.endswith((SUFFIX, nemo.SUFFIX)) else path
    if not path.exists() or not folder.is_dir():
        raise UserError(f"{place} is not there: give a folder with {CONFIG} and *{SUFFIX}")
    tensors: Mapping[str, Callable[[], np.ndarray]]
    if path.name.endswith(nemo.SUFFIX):
        config, beside, tensors = nemo.contents(path)
    else:
        config, beside, tensors = _contents(place, folder, path)
    name = _family_of(place, config.get("model_type"))
    family = FAMILIES[name]
    try:
        options = family.options(config, beside) | config.get(OWN, {})
        if not head:
            options |= family.encoder
        prefix = f"{family.prefix(family.config(**options))}."
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: {_mistake(error)}") from error
    if not any(name.startswith(prefix) for name in tensors):  # of a model without a head
        tensors = {prefix + name: read for name, read in tensors.items()}
    if head and not any(re.search(family.head, name) for name in tensors):
        raise UserError(
            f"{place} has no output layer: begin with its encoder and a new one, "
            f"init_from=hf-encoder:{place}"
        )
    return Source(str(place), folder, name, options, head, tensors)


def _mistake(error: Exception) -> str:
    """What is wrong with a configuration, by the error that it led to."""
    if isinstance(error, UserError):
        return str(error)
    what = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
    return f"{CONFIG} {what}: fetch it again"


def _family_of(place: str | Path, kind: Any) -> str:
    """Which of `FAMILIES` reads a model_type."""
    name = next((n for n, family in FAMILIES.items() if kind in family.types), None)
    if name is None:
        types = sorted(kind for family in FAMILIES.values() for kind in family.types)
        raise UserError(
            f"{place} is of the model_type {kind!r}, which cannot be read: use one of "
            f"{', '.join(types)}"
        )
    return name


def to_tensors(name: str, options: Mapping[str, Any], params: Any) -> dict[str, np.ndarray]:
    """What a safetensors file of a model holds: the inverse of reading one, float32 by name.

    Args:
      name: of the family. options: of the model.
      params: nested dicts; all of the model's.

    Raises:
      UserError: they are of another model.
    """
    family = FAMILIES[name]
    return mapping.to_tensors(family.table(family.config(**options), True), params)


def write_tensors(name: str, options: Mapping[str, Any], params: Any, folder: Path) -> None:
    """Writes a model's safetensors, as transformers has them, into a folder; see `to_tensors`."""
    tensors = to_tensors(name, options, params)
    for tensor in [tensor for tensor in tensors if tensor.endswith(".running_var")]:
        counter = f"{tensor.removesuffix('running_var')}num_batches_tracked"
        tensors[counter] = np.zeros((), np.int64)  # of a batch norm, which none reads
    library().numpy.save_file(tensors, folder / f"model{SUFFIX}", metadata={"format": "pt"})


def _contents(
    place: str | Path, folder: Path, path: Path
) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Callable[[], np.ndarray]]]:
    """config.json, what is said beside it, and what reads each tensor, by name."""
    config = _json(folder / CONFIG)
    if config is None:
        raise UserError(f"{place} holds no {CONFIG}, so it is no model: give the model's folder")
    beside = {k: v for name in _BESIDE for k, v in (_json(folder / name) or {}).items()}
    return config, beside, _tensors(place, folder, path)


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error


def _tensors(place: str | Path, folder: Path, path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """What reads each tensor, by name."""
    if path != folder:
        files = [path]
    elif index := _json(folder / INDEX):
        try:
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX} does not name files: fetch it again") from error
    else:
        files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise UserError(
            f"{place} holds no *{SUFFIX}: save the model as such, by save_pretrained(folder)"
        )
    found: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        stored = _opened(file)
        for name in stored.keys():
            if name in found:
                raise UserError(
                    f"{place}: the tensor {name} is in two files: leave those of one model, or "
                    f"name one file"
                )
            found[name] = functools.partial(_read, stored, file, name)
    return found


def library() -> Any:
    """`safetensors`; UserError where it is missing."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            "pretrained models need safetensors: pip install 'fedasr[pretrained]'"
        ) from error
    return safetensors


def _opened(path: Path) -> Any:
    safetensors = library()
    try:
        return safetensors.safe_open(path, framework="np")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, but an index lists it: fetch it again") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error


def _read(stored: Any, path: Path, name: str) -> np.ndarray:
    try:
        return np.asarray(stored.get_tensor(name))
    except Exception as error:  # of a kind that depends on the version
        pass_exhaustion(error, f"reading {path}")
        raise UserError(f"{path}: the tensor {name} cannot be read ({error})") from error


def fill(params: Mapping[str, Any], init: Any) -> Any:
    """All of a model's parameters: those that were read, and those of `init` for the rest."""
    read = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    return jax.tree.map_with_path(lambda path, x: read.get(jax.tree_util.keystr(path), x), init)
