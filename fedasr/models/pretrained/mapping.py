"""From the tensors of a file to parameters and back: one table, used both ways."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedasr.errors import UserError

Tensors = Mapping[str, np.ndarray]
Convert = Callable[..., tuple[np.ndarray, ...]]
# What files spell in another way: weight norm before and after PyTorch's parametrisations, and the
# layers of checkpoints that TensorFlow began.
_SPELLINGS = (
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
    (".weight", ".gamma"),
    (".bias", ".beta"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Parameters that some tensors of a file make.

    Attributes:
      paths: of the parameters, such as "encoder/block_0/attention/query/kernel".
      names: of the tensors, as they are written.
      read: from the tensors' arrays to the parameters'. write: the inverse.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    read: Convert
    write: Convert


def same(path: str, name: str, shape: Sequence[int] | None = None) -> Entry:
    """A tensor as it is; `shape`: of the tensor where all its axes but one have length 1."""

    def read(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.reshape(-1) if shape else x,)

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.reshape(shape) if shape else x,)

    return Entry((path,), (name,), read, write)


def _transposed(x: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.ascontiguousarray(x.T),)


def dense(path: str, name: str, bias: bool = True) -> list[Entry]:
    """A dense layer: [out, in] there, [in, out] here."""
    kernel = Entry((f"{path}/kernel",), (f"{name}.weight",), _transposed, _transposed)
    return [kernel, same(f"{path}/bias", f"{name}.bias")] if bias else [kernel]


def norm(path: str, name: str) -> list[Entry]:
    """A layer norm's or group norm's scale and bias."""
    return [same(f"{path}/scale", f"{name}.weight"), same(f"{path}/bias", f"{name}.bias")]


def convolution(path: str, name: str, width: int, bias: bool = True) -> list[Entry]:
    """A convolution over time: [out, in, width] there, a matrix [width * in, out] here."""

    def read(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.ascontiguousarray(x.transpose(2, 1, 0).reshape(-1, x.shape[0])),)

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        taps = x.reshape(width, -1, x.shape[1])
        return (np.ascontiguousarray(taps.transpose(2, 1, 0)),)

    kernel = Entry((f"{path}/kernel",), (f"{name}.weight",), read, write)
    return [kernel, same(f"{path}/bias", f"{name}.bias")] if bias else [kernel]


def permuted(path: str, name: str, shape: Sequence[int], order: Sequence[int]) -> Entry:
    """A tensor with other axes in front: `order` of the tensor's axes, without those of length 1.

    Args:
      path, name: see `Entry`.
      shape: of the tensor; -1 for what the parameter tells.
      order: axes of the tensor as the parameter has them; those of length 1 are left out.
    """
    inverse = np.argsort(order)

    def read(x: np.ndarray) -> tuple[np.ndarray, ...]:
        kept = [axis for axis in order if shape[axis] != 1]
        return (np.ascontiguousarray(x.transpose(order).reshape([x.shape[i] for i in kept])),)

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        sizes = iter(x.shape)
        whole = [1 if shape[axis] == 1 else next(sizes) for axis in order]
        return (np.ascontiguousarray(x.reshape(whole).transpose(inverse)),)

    return Entry((path,), (name,), read, write)


def output(path: str, name: str, blank: int, tail: int = 0) -> list[Entry]:
    """A CTC head, whose blank comes first here: [vocab, in] there, [in, vocab] here.

    Args:
      path, name: see `Entry`.
      blank: its number there.
      tail: axes of length 1 that the tensor ends in, such as of a convolution of width 1.
    """

    def first(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[blank : blank + 1], x[:blank], x[blank + 1 :]])

    def back(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[1 : blank + 1], x[:1], x[blank + 1 :]])

    def read(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return _transposed(first(x.reshape(x.shape[: x.ndim - tail])))

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = back(np.ascontiguousarray(x.T))
        return (rows.reshape(*rows.shape, *[1] * tail),)

    return [
        Entry((f"{path}/kernel",), (f"{name}.weight",), read, write),
        Entry((f"{path}/bias",), (f"{name}.bias",), lambda x: (first(x),), lambda x: (back(x),)),
    ]


def batch_norm(path: str, name: str, epsilon: float) -> Entry:
    """A batch norm as the affine map that it is where nothing is trained.

    Statistics over clients' frames are no part of federated training. What is written is a batch
    norm of mean 0 and variance 1 - epsilon that computes the same.
    """
    unit = np.float32(1.0) - np.float32(epsilon)

    def read(
        weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        scale = weight / np.sqrt(variance + np.float32(epsilon))
        return scale, bias - mean * scale

    def write(scale: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, ...]:
        return scale, bias, np.zeros_like(bias), np.full_like(bias, unit)

    parts = ("weight", "bias", "running_mean", "running_var")
    names = tuple(f"{name}.{part}" for part in parts)
    return Entry((f"{path}/scale", f"{path}/bias"), names, read, write)


def to_params(
    table: Sequence[Entry], names: Sequence[str], get: Callable[[str], np.ndarray], shapes: Any
) -> dict[str, Any]:
    """The parameters that a file holds.

    Args:
      table: of the model.
      names: of the file's tensors. get: reads one.
      shapes: of the model's parameters, nested dicts; what the table does not name is left out.

    Returns:
      Nested dicts of float32 arrays.

    Raises:
      UserError: a tensor is missing, has another shape, or holds what is not finite.
    """
    there, wanted = set(names), _flat(shapes)
    found: dict[str, np.ndarray] = {}
    for entry in table:
        arrays = []
        for name in entry.names:
            spelled = _spelled(name, there)
            if spelled is None:
                raise UserError(f"the tensor {name} is missing: fetch the model again")
            array = np.asarray(get(spelled)).astype(np.float32)
            if not np.isfinite(array).all():
                raise UserError(f"the tensor {name} has values that are not finite: fetch it again")
            arrays.append(array)
        try:
            values = entry.read(*arrays)
        except (ValueError, IndexError) as error:
            raise UserError(
                f"the tensor {entry.names[0]} has shape {list(arrays[0].shape)}, which is none of "
                "this model: fetch the model again"
            ) from error
        for path, value in zip(entry.paths, values, strict=True):
            if path not in wanted or tuple(wanted[path].shape) != value.shape:
                shape = list(wanted[path].shape) if path in wanted else None
                raise UserError(
                    f"the tensor {entry.names[0]} makes {path} {list(value.shape)} where the "
                    f"configuration beside it says {shape}: fetch config.json and weights again"
                )
            found[path] = value
    return nested(found)


def to_tensors(table: Sequence[Entry], params: Any) -> dict[str, np.ndarray]:
    """What a file of these parameters holds: the inverse of `to_params`, float32 by name.

    Raises:
      UserError: the parameters lack one of the table's, or have one that it lacks.
    """
    flat = _flat(params)
    if more := sorted(flat.keys() - {path for entry in table for path in entry.paths}):
        raise UserError(
            f"the parameters hold {more[0]}, for which a folder has no place: merge what was added "
            "to the model first"
        )
    if lacking := [path for entry in table for path in entry.paths if path not in flat]:
        raise UserError(f"the parameters lack {lacking[0]}: they are of another model")
    written: dict[str, np.ndarray] = {}
    for entry in table:
        values = entry.write(*(np.asarray(flat[path], np.float32) for path in entry.paths))
        written |= dict(zip(entry.names, values, strict=True))
    return written


def spelled(names: set[str], there: set[str]) -> set[str]:
    """The names as a file spells them, of those that it has."""
    return {found for name in names if (found := _spelled(name, there)) is not None}


def _spelled(name: str, there: set[str]) -> str | None:
    """The name as the file spells it; None if it has none such."""
    if name in there:
        return name
    for ours, theirs in _SPELLINGS:
        if name.endswith(ours) and (other := name.removesuffix(ours) + theirs) in there:
            return other
    return None


def _flat(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of what has paths such as "encoder/norm/scale"."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, leaf = path.split("/")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return tree
