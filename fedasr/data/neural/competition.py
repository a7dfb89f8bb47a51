"""The competition layout (Willett et al., Nature 620, 2023): a MATLAB file a day.

Folders `train`, `test` and `competitionHoldOut` become splits. A file holds `sentenceText` (a
character matrix or a cell array, a sentence a row), the cell arrays `tx1` to `tx4` (threshold
crossings at four thresholds) and `spikePow` (spike band power), a matrix [time bins of 20 ms,
channels] per sentence, and `blockIdx` (each sentence's block). Only the fields that the chosen
areas name are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedasr.data.neural.areas import Area, chosen_channels
from fedasr.errors import UserError

SPLITS = ("train", "test", "competitionHoldOut")


class Sentence(NamedTuple):
    """One sentence as recorded: `signal` [time, channels], or why there is none."""

    id: str
    text: str
    block: str
    split: str
    signal: np.ndarray | None
    reason: str = ""
    detail: str = ""


def read_day(path: Path, split: str, areas: Sequence[Area]) -> list[Sentence]:
    """The sentences of one MATLAB file in the competition layout.

    Raises:
      UserError: scipy is missing, the file cannot be read, a field is missing, or fields differ in
        their number of sentences.
    """
    fields = list(dict.fromkeys(area.field for area in areas))
    content = load_matlab(path, ["sentenceText", "blockIdx", *fields])
    texts = [str(_plain(t)).strip() for t in np.ravel(content["sentenceText"])]
    blocks = [str(_plain(b)) for b in np.ravel(content["blockIdx"])]
    cells = {}
    for field in fields:
        if content[field].dtype != object:
            raise UserError(f"{path}: {field} is no cell array of [time, channels] matrices")
        cells[field] = list(np.ravel(content[field]))
    counts = {"sentenceText": len(texts), "blockIdx": len(blocks)}
    counts |= {field: len(of_field) for field, of_field in cells.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"{path}: the fields differ in their number of sentences: {counts}")
    sentences = []
    for i, (text, block) in enumerate(zip(texts, blocks, strict=True)):
        id = f"{split}/{path.stem}/{i:05d}"
        signal, problem = chosen_channels({field: cells[field][i] for field in fields}, areas)
        reason = "wrong_shape" if problem else ""
        sentences.append(Sentence(id, text, block, split, signal, reason, problem))
    return sentences


def _plain(value: Any) -> Any:
    """What a cell holds: MATLAB wraps everything in arrays."""
    while isinstance(value, np.ndarray):
        if value.size != 1:
            return "" if value.size == 0 else " ".join(str(v) for v in value.ravel())
        value = value.ravel()[0]
    return value


def load_matlab(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    """Fields of a MATLAB file; raises UserError where it, a field or scipy is missing."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("MATLAB files need scipy: install it (pip install scipy)") from None
    try:
        content = loadmat(path, variable_names=list(fields))
    except NotImplementedError:
        raise UserError(f"{path} is a MATLAB file of version 7.3: save it with -v7") from None
    except MemoryError:
        raise
    except Exception as error:  # scipy raises whatever the damaged bytes lead to
        raise UserError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if missing := [field for field in fields if field not in content]:
        raise UserError(f"{path} has no field {', '.join(missing)}")
    return content
