"""A manifest of arrays, for recordings in any form of their own.

Such as the handwriting of Willett et al. (Nature 593, 2021). JSON lines, one a sentence:

    {"session": "2019.05.08", "block": 3, "text": "the sentence", "split": "train",
     "features": "2019.05.08/sentences.mat", "array": "neuralActivityCube", "row": 7, "bins": 210}

`features` is a .npy, .npz or .mat file, relative to the manifest; `array` names the array in the
latter two. It is [time, channels], or [sentences, time, channels] with `row`; `bins` is the true
length where it is padded. `id` (default: the line's number) and `split` (default "train") may be
left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data.corpus import valid_split_name
from fedasr.data.neural.areas import Area, chosen_channels
from fedasr.data.neural.competition import load_matlab
from fedasr.data.utterances import Rejected
from fedasr.errors import UserError


def read_lines(path: Path) -> list[dict[str, Any] | Rejected]:
    """The lines of a manifest, and those that make no sense.

    Raises:
      UserError: it cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the manifest {path} cannot be read: {error}") from error
    lines: list[dict[str, Any] | Rejected] = []
    for number, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            lines.append(_entry(content, number))
        except ValueError as error:
            lines.append(Rejected(f"line {number}", "bad_manifest_line", str(error)))
    if not lines:
        raise UserError(f"the manifest {path} is empty: write one JSON object a line into it")
    return lines


def _entry(content: str, number: int) -> dict[str, Any]:
    """A line's fields; raises ValueError for what is missing or wrong."""
    entry = json.loads(content)
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    for key in ("session", "text", "features"):
        if not isinstance(entry.get(key), str) or (key != "text" and not entry[key]):
            raise ValueError(f"{key} is missing or not a string")
    for key in ("row", "bins"):
        if key in entry and (type(entry[key]) is not int or entry[key] < 0):
            raise ValueError(f"{key} is no whole number")
    entry = {"id": f"line {number}", "split": "train"} | entry
    if not valid_split_name(str(entry["split"])):
        raise ValueError(f"{entry['split']!r} cannot be the name of a split")
    entry["id"] = str(entry["id"])
    return entry


def load_array(path: Path, name: str | None) -> np.ndarray:
    """An array of a file; a UserError that names the file where there is none."""
    if path.suffix not in (".npy", ".npz", ".mat"):
        raise UserError(f"{path}: features are read from .npy, .npz and .mat files")
    if path.suffix != ".npy" and not name:
        raise UserError(f"{path} holds several arrays: name one with `array` in the manifest")
    if path.suffix == ".mat" and name:
        return load_matlab(path, [name])[name]
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except KeyError:
        raise UserError(f"{path} has no array {name!r}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def manifest_sentence(
    array: np.ndarray, line: dict[str, Any], areas: Sequence[Area] | None
) -> tuple[np.ndarray | None, str]:
    """(a line's sentence of an array, [time, channels]; what is wrong with it)."""
    if "row" in line:
        if array.ndim != 3:
            return None, f"row is given, but the array is {array.shape}"
        if line["row"] >= len(array):
            return None, f"row {line['row']} of {len(array)}"
        array = array[line["row"]]
    if "bins" in line:
        if array.ndim and line["bins"] > len(array):
            return None, f"{line['bins']} bins of {len(array)}"
        array = array[: line["bins"]]
    if areas is None and array.ndim == 2:
        areas = [Area("features", 0, array.shape[1])]
    return chosen_channels({"features": np.asarray(array)}, areas or [Area("features", 0, 0)])
