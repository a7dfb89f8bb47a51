"""Folders of safetensors, as Hugging Face's libraries write them: read, compared, written back.

A model is a dict from a tensor's name to a numpy array (bfloat16 as JAX has it). In a folder
with parts of its own, such as a diffusion pipeline, names begin with the part's: "unet/conv_in".
Floating-point tensors are merged; others, such as counters, are those of the first model.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedasr.errors import UserError

Model = dict[str, np.ndarray]
SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
PROVENANCE = "merged.json"
MERGED = ("BF16", "F16", "F32", "F64")
# Weights in other formats, and what the author of the first model says of it.
_LEFT_OUT = (
    ".safetensors",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
_CARDS = ("README.md",)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """file: relative to the folder. key: in the file. dtype: safetensors' name of it."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model on disk.

    Attributes:
      name: as the user gave it. path: the folder. whole: whether the folder is the model's, so that
        what else it holds (configuration, tokenizer) belongs to it.
      tensors: by name. metadata: of each file, as safetensors has it.
    """

    name: str
    path: Path
    whole: bool
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Mapping[str, str]]

    @property
    def merged(self) -> list[str]:
        """Names of the tensors that are merged."""
        return [name for name, tensor in self.tensors.items() if tensor.dtype in MERGED]


def _library() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            "reading checkpoints needs safetensors: pip install 'fedasr[merging]'"
        ) from error
    return safetensors


def open_folder(name: str | Path) -> Folder:
    """Looks into a model: names, shapes, files; reads no weights.

    Args:
      name: a folder (with `*.safetensors.index.json` only the files that it lists), one file, or
        an index. A file beside a config.json, alone, stands for its folder.

    Raises:
      UserError: nothing there, a damaged or missing file, or a tensor that two files have.
    """
    path = Path(name)
    whole = path.is_dir()
    if whole:
        files = list(_files(path))
    elif path.name.endswith(INDEX) and path.is_file():
        whole, path = True, path.parent
        files = list(_files(path))
    elif path.name.endswith(SUFFIX) and path.is_file():
        single, path = path, path.parent
        alone = list(path.glob(f"*{SUFFIX}")) == [single]
        whole = alone and (path / "config.json").is_file()
        files = [single]
    else:
        raise UserError(f"{name}: there is no folder and no file *{SUFFIX} of that name")
    if not files:
        raise UserError(
            f"{name} holds no *{SUFFIX}: save the model as such, for instance with "
            "save_pretrained(folder)"
        )
    tensors: dict[str, Tensor] = {}
    metadata = {}
    for file in files:
        where = file.relative_to(path)
        prefix = "" if where.parent == Path(".") else f"{where.parent.as_posix()}/"
        with _opened(file) as stored:
            metadata[str(where)] = dict(stored.metadata() or {})
            for key in stored.keys():
                found = stored.get_slice(key)
                tensor = Tensor(str(where), key, found.get_dtype(), tuple(found.get_shape()))
                if (other := tensors.get(prefix + key)) is not None:
                    raise UserError(
                        f"{name}: the tensor {prefix + key} is in both {other.file} and {where}: "
                        "leave the files of one model there, or an index that lists them"
                    )
                tensors[prefix + key] = tensor
    _complete(name, path, tensors)
    return Folder(str(name), path, whole, tensors, metadata)


def _files(folder: Path) -> Iterator[Path]:
    """A folder's safetensors, those of its parts, too; in a part with an index what that lists."""
    for place in sorted({file.parent for file in folder.rglob(f"*{SUFFIX}*")}):
        if any(part.startswith(".") for part in place.relative_to(folder).parts):
            continue
        listed = {file for index in place.glob(f"*{INDEX}") for file in _index(index).values()}
        if listed:
            yield from (place / file for file in sorted(listed))
        else:
            yield from sorted(place.glob(f"*{SUFFIX}"))


def _index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in files.values()):
            raise TypeError("file names are text")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as an index of safetensors ({error!r}): fetch it again"
        ) from error


def _complete(name: str | Path, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of an index is in the file that it names."""
    files = {(tensor.file, tensor.key) for tensor in tensors.values()}
    for place in {(folder / file).parent for file, _ in files}:
        for index in place.glob(f"*{INDEX}"):
            for key, file in _index(index).items():
                where = str((place / file).relative_to(folder))
                if any(tensor.file == where for tensor in tensors.values()) and (
                    (where, key) not in files
                ):
                    raise UserError(
                        f"{name}: {where} lacks the tensor {key} that {index.name} lists: fetch "
                        "it again"
                    )


def _opened(path: Path) -> Any:
    library = _library()
    try:
        return library.safe_open(path, framework="np")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, but an index lists it: fetch it again") from error
    except (library.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error


def compare(folders: Sequence[Folder], say: Callable[[str], None] = lambda text: None) -> None:
    """Whether models can be merged: the same tensors of the same shapes.

    Args:
      folders: two or more. say: takes a line for what differs and does not matter.

    Raises:
      UserError: fewer than two, a missing or resized tensor, or quantised weights; it names the
        first.
    """
    if len(folders) < 2:
        raise UserError("merging needs two models or more: --models=A,B")
    first = folders[0]
    for one in folders:
        _check_types(one)
    if not first.merged:
        raise UserError(f"{first.name} has no floating-point tensor: there is nothing to merge")
    for other in folders[1:]:
        _check_names(first, other)
        _check_names(other, first)
        _check_tensors(first, other)
        kinds = {n for n, t in first.tensors.items() if other.tensors[n].dtype != t.dtype}
        if kinds:
            say(f"{other.name}: {len(kinds)} tensors are converted to the types of {first.name}")


def _check_types(one: Folder) -> None:
    """Raises UserError for floating-point tensors of a type that is not merged."""
    for name, tensor in one.tensors.items():
        if tensor.dtype not in MERGED and tensor.dtype.startswith(("F", "C")):
            raise UserError(
                f"{one.name}: the tensor {name} is {tensor.dtype}, which cannot be merged: "
                f"write the model with one of {', '.join(MERGED)} first"
            )


def _check_names(a: Folder, b: Folder) -> None:
    """Raises UserError unless `b` has all tensors of `a`."""
    if lacks := [name for name in a.tensors if name not in b.tensors]:
        raise UserError(
            f"{b.name} lacks the tensor {lacks[0]} that {a.name} has"
            + (f", and {len(lacks) - 1} more" if len(lacks) > 1 else "")
            + ": only models of one architecture can be merged"
        )


def _check_tensors(first: Folder, other: Folder) -> None:
    """Raises UserError for a tensor of another shape, or merged in one alone."""
    for name, tensor in first.tensors.items():
        there = other.tensors[name]
        if there.shape != tensor.shape:
            raise UserError(
                f"the tensor {name} has shape {list(there.shape)} in {other.name} and "
                f"{list(tensor.shape)} in {first.name}: bring them to one size first (such as "
                "one vocabulary)"
            )
        if (there.dtype in MERGED) != (tensor.dtype in MERGED):
            raise UserError(
                f"the tensor {name} is {there.dtype} in {other.name} and {tensor.dtype} in "
                f"{first.name}: they cannot be merged"
            )


def read(folder: Folder, like: Folder | None = None) -> tuple[Model, str]:
    """A model's tensors, and the SHA-256 of all that was read.

    Args:
      folder: to read. like: whose types and order the floating-point tensors get; default its own.

    Raises:
      UserError: a damaged file, or values that are not finite.
    """
    like = like or folder
    model: Model = {}
    digest = hashlib.sha256()
    files: dict[str, list[str]] = {}
    for name in sorted(folder.tensors):
        files.setdefault(folder.tensors[name].file, []).append(name)
    for file, names in files.items():
        with _opened(folder.path / file) as stored:
            for name in names:
                value = np.asarray(stored.get_tensor(folder.tensors[name].key))
                digest.update(f"{name} {value.dtype} {value.shape} ".encode())
                digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
                if folder.tensors[name].dtype in MERGED:
                    if not np.isfinite(value).all():
                        raise UserError(
                            f"{folder.name}: the tensor {name} has values that are not finite"
                        )
                    value = value.astype(_DTYPES[like.tensors[name].dtype], copy=False)
                value.setflags(write=False)  # the same arrays are given to every score
                model[name] = value
    return {name: model[name] for name in like.tensors}, digest.hexdigest()


_DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def parts(models: Sequence[Model], folders: Sequence[Folder]) -> tuple[list[Model], Model]:
    """What is merged of every model, in types that JAX has, and the rest, which is the first's.

    Args:
      models: from `read`. folders: theirs, compared.

    Raises:
      UserError: models differ in a tensor of whole numbers, as quantised weights do; one number
        alone, a counter, may differ.
    """
    merged = folders[0].merged
    rest = {name: models[0][name] for name in folders[0].tensors if name not in set(merged)}
    for model, folder in zip(models[1:], folders[1:], strict=True):
        for name, value in rest.items():
            if value.size > 1 and not np.array_equal(value, model[name]):
                raise UserError(
                    f"the tensor {name} ({folder.tensors[name].dtype}) differs between "
                    f"{folders[0].name} and {folder.name} and is no floating-point one: quantised "
                    "weights cannot be merged, write the models with floating-point ones first"
                )
    # 64 bits are more than JAX merges in.
    narrow = [
        {
            name: model[name].astype(np.float32) if model[name].dtype == np.float64 else model[name]
            for name in merged
        }
        for model in models
    ]
    return narrow, rest


def whole(folder: Folder, merged: Model, rest: Model) -> Model:
    """A model with all tensors of a folder, in its types.

    Args:
      folder: the first model's. merged, rest: as of `parts`.
    """
    values = {**merged, **rest}
    return {
        name: values[name].astype(_DTYPES[tensor.dtype], copy=False)
        if tensor.dtype in MERGED
        else values[name]
        for name, tensor in folder.tensors.items()
    }


def write(
    folder: Folder, model: Model, out: str | Path, provenance: Mapping[str, Any] | None = None
) -> Path:
    """Writes a model as another was: files, types, indices, and whatever its folder holds beside.

    Not copied are weights in other files, the model card and hidden files. The folder appears at
    once: whoever sees it sees all of it.

    Args:
      folder: to do as in. model: every tensor of it, in its types. out: the new folder; one that is
        there is replaced if this function wrote it, by one process at a time. provenance: is left
        in `merged.json`.

    Raises:
      UserError: `out` is something else, or cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out / PROVENANCE).is_file():
        raise UserError(f"{out} is not a merged model: choose another folder, or remove it")
    fresh, old = (out.with_name(f".{out.name}.{kind}") for kind in ("new", "old"))
    try:
        for left in (fresh, old):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir(parents=True)
        if folder.whole:
            _copy_others(folder.path, fresh)
        for file in folder.metadata:
            held = {
                tensor.key: np.asarray(model[name], order="C")
                for name, tensor in folder.tensors.items()
                if tensor.file == file
            }
            place = fresh / file
            place.parent.mkdir(parents=True, exist_ok=True)
            _library().numpy.save_file(held, place, metadata=dict(folder.metadata[file]) or None)
        (fresh / PROVENANCE).write_text(json.dumps(dict(provenance or {}), indent=1) + "\n")
        if out.exists():
            out.rename(old)
            fresh.rename(out)
            shutil.rmtree(old)
        else:
            fresh.rename(out)
    except (OSError, _library().SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"the merged model cannot be written to {out} ({error})") from error
    return out


def _copy_others(source: Path, target: Path) -> None:
    """What a model's folder holds beside weights."""

    def left_out(place: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name.startswith(".")
            or name.endswith(_LEFT_OUT)
            or name in (*_CARDS, PROVENANCE)
            or target.resolve().is_relative_to(Path(place, name).resolve())
        ]

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)
