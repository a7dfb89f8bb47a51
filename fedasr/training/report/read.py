"""What a report needs of a run's files, whatever is missing in them."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.training.logging import from_json

Record = Mapping[str, Any]
_MAX_COLUMNS = 240


def existing_folder(workdir: str | Path) -> Path:
    """The work directory; raises UserError if there is none."""
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"there is no work directory {workdir}")
    return workdir


def read_object(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if it is missing or no JSON object."""
    try:
        value = from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def mapping_at(record: Any, key: str) -> Mapping[str, Any]:
    """The mapping at a key; empty if there is none."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def number_at(record: Any, *keys: str) -> float | None:
    """The finite number at a path of keys, or None."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(record, bool) or not isinstance(record, int | float):
        return None
    return float(record) if math.isfinite(record) else None


def is_seed(record: Record) -> bool:
    """Whether it is of the seed's training."""
    return record.get("phase") == "seed"


def series_of(records: Iterable[Record], x: str, *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 arrays: `x` and the values at `keys` of the records that hold both."""
    pairs = [(number_at(r, x), number_at(r, *keys)) for r in records]
    kept = np.array([p for p in pairs if None not in p], np.float64).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def is_central(summary: Record, config: Record) -> bool:
    """Whether the run is the central baseline."""
    algorithm = config.get("algorithm") or summary.get("algorithm")
    return algorithm == "central"


def stages_of(
    records: Sequence[Record], central: bool, config: Record
) -> tuple[list[Record], list[Record], str]:
    """(records of the main stage, those of the seed, the unit that the main stage counts).

    The steps of central training follow those of its seed. Logs that do not say which is which are
    told apart by the seed's number of steps in the configuration.
    """
    steps = [r for r in records if number_at(r, "step") is not None and is_seed(r)]
    if not central:
        rounds = [r for r in records if number_at(r, "round") is not None and not is_seed(r)]
        return rounds, steps, "round"
    if any(r.get("stage") for r in steps):
        return *_divided(steps, lambda r: r.get("stage") == "main"), "step"
    before = _seed_steps(steps, config)
    return *_divided(steps, lambda r: _step(r) > before), "step"


def _divided(
    records: Sequence[Record], of_main: Callable[[Record], bool]
) -> tuple[list[Record], list[Record]]:
    """(those of the main stage, the others)."""
    return [r for r in records if of_main(r)], [r for r in records if not of_main(r)]


def _step(record: Record) -> float:
    return number_at(record, "step") or 0.0


def _seed_steps(steps: Sequence[Record], config: Record) -> float:
    """How many of a central run's steps were its seed's, by the configuration."""
    if config.get("init_from"):
        return 0.0
    total = number_at(config, "central", "steps")
    if total is not None and max(map(_step, steps), default=0.0) == total:
        return 0.0  # there was no split for a seed
    return number_at(config, "seed_training", "steps") or 0.0


def evaluation_curves(
    records: Sequence[Record], metric: str, unit: str = "round"
) -> dict[str, tuple]:
    """`(rounds or steps, values)` of a metric by split, `test` first."""
    splits = sorted(
        {s for r in records for s in mapping_at(r, "eval")}, key=lambda s: (s != "test", s)
    )
    curves = {s: series_of(records, unit, "eval", s, metric) for s in splits}
    return {s: curve for s, curve in curves.items() if curve[0].size}


def all_splits(records: Sequence[Record], summary: Record) -> list[str]:
    """Every split that was ever evaluated."""
    found = [str(s) for r in records for s in mapping_at(r, "eval")]
    return sorted({*found, *map(str, mapping_at(summary, "wer"))})


def is_private(summary: Record) -> bool | None:
    """Whether noise was added; None if the summary does not say, as that of a stopped run."""
    privacy = mapping_at(summary, "privacy")
    if privacy.get("enabled") is False:
        return False
    noise = [number_at(privacy, key) for key in ("noise_multiplier", "sigma")]
    known = [value for value in noise if value is not None]
    return any(value > 0 for value in known) if known else None


def final_wer(summary: Record) -> tuple[str, float] | None:
    """The split that counts most and its final word error rate."""
    for split in ("test", "dev", *mapping_at(summary, "wer")):
        value = number_at(summary, "wer", split)
        if value is not None:
            return split, value
    return None


def initial_wer(summary: Record, split: str | None) -> float | None:
    """Word error rate before federated training: one number, or one for each split."""
    value = number_at(summary, "initial_wer")
    return value if value is not None else number_at(summary, "initial_wer", str(split))


def main_deployment(summary: Record) -> Record:
    """The extrapolation that the run stands for: the first with an epsilon, maybe infinite."""
    found = mapping_at(summary, "privacy").get("extrapolations")
    found = found if isinstance(found, list) else []
    return next((e for e in found if epsilon_of(e) is not None), {})


def epsilon_of(record: Any) -> float | None:
    """Its epsilon, which may be infinite, or None."""
    value = record.get("epsilon") if isinstance(record, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def layer_matrix(
    records: Sequence[Record], key: str
) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """`(layers, rounds [r], values [layers, r])`; neighbouring rounds are averaged to fit."""
    records = [r for r in records if mapping_at(r, key)]
    if not records:
        return None
    names = list(dict.fromkeys(name for r in records for name in r[key]))
    values = np.array([[number_at(r, key, n) for n in names] for r in records], np.float64).T
    rounds = np.array([number_at(r, "round") for r in records], np.float64)
    size = -(-len(rounds) // _MAX_COLUMNS)
    groups = [slice(i, i + size) for i in range(0, len(rounds), size)]
    known = np.isfinite(values)
    sums = np.stack([np.where(known, values, 0.0)[:, g].sum(1) for g in groups], 1)
    counts = np.stack([known[:, g].sum(1) for g in groups], 1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return names, np.array([rounds[g].mean() for g in groups]), means
