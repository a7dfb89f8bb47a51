"""Which tables a sweep runs: those of the recipes, of a file, of a grid, or of a folder's runs."""

import dataclasses
import importlib
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fedasr.cli.sweep.runs import config_path
from fedasr.errors import UserError
from fedasr.recipes import tables
from fedasr.recipes.tables import Table
from fedasr.training.logging import write_json_atomic

TABLE_FILE = "table.json"
_TUPLES = ("seeds", "report", "reach")  # fields of a table that JSON has as lists
_REGISTRIES = tuple(
    f"fedasr.recipes.{name}"
    for name in ("published", "mini", "mini_algorithms", "own_speech", "adapted")
)


def registry(path: str = "") -> dict[str, Table]:
    """The tables that are defined, by name.

    Args:
      path: a Python file with `TABLES`; "" for those of `fedasr.recipes`.

    Raises:
      UserError: if the file cannot be read or defines no tables.
    """
    if path:
        try:
            return dict(runpy.run_path(path)["TABLES"])
        except (OSError, SyntaxError, KeyError) as error:
            raise UserError(f"--tables={path}: no TABLES ({error})") from error
    found: dict[str, Table] = {}
    for name in _REGISTRIES:
        try:
            found |= importlib.import_module(name).TABLES
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return found


def ad_hoc(config: str, grid: str, seeds: Sequence[int]) -> Table:
    """A table with a row for each point of a grid, named by its configuration file."""
    name = re.sub(r"\W", "_", Path(config_path(config)).stem, flags=re.ASCII)
    values = parse_grid(grid)
    points = [dict(zip(values, point, strict=True)) for point in product(*values.values())]
    rows = tuple(tables.Row(tables.describe_point(point) or name, point) for point in points)
    return Table(name, f"Grid of {config}", config, rows, seeds=tuple(seeds))


def parse_grid(text: str) -> dict[str, tuple[str, ...]]:
    """{"a.b": ("1", "2")} of "a.b=1,2;..."; values stay as the launcher's flags will read them."""
    fields = parse_fields(text, "--grid")
    return {field: tuple(map(str.strip, values.split(","))) for field, values in fields.items()}


def parse_fields(text: str, flag: str) -> dict[str, str]:
    """{"a.b": "value"} of "a.b=value;...".

    Raises:
      UserError: for a part without "=" or a field that is named twice.
    """
    fields: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        field, equals, value = part.partition("=")
        if not equals or not field.strip():
            raise UserError(f"{flag}: {part!r} is not section.field=value")
        if field.strip() in fields:
            raise UserError(f"{flag}: {field.strip()} is named twice")
        fields[field.strip()] = value.strip()
    return fields


def check(table: Table, fixed: Mapping[str, str]) -> None:
    """Raises UserError for a table, or fixed fields, that cannot be run."""
    tables.check(table)
    if "seed" in fixed:
        raise UserError("--set: the seed is set by --seeds")
    for run in tables.possible(table):
        if taken := sorted(fixed.keys() & run.point.keys()):
            raise UserError(f"--set: {taken[0]} is in the grid of table {table.name!r}")


def save_table(table: Table, out: Path) -> None:
    """Keeps the definition beside the runs, so that they can be collected without it."""
    (out / table.name).mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / table.name / TABLE_FILE, dataclasses.asdict(table))


def load_table(path: Path) -> Table:
    """The table that `save_table` kept.

    Raises:
      UserError: if the file is not one.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        for part in ("rows", "starts"):
            rows = fields[part]
            for row in rows:
                row["grid"] = None if row["grid"] is None else _tuples(row["grid"])
            fields[part] = tuple(tables.Row(**row) for row in rows)
        fields["better"] = tuple(tuple(pair) for pair in fields["better"])
        fields["grid"] = _tuples(fields["grid"])
        return Table(**(fields | {name: tuple(fields[name]) for name in _TUPLES if name in fields}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no table: {error}") from error


def _tuples(grid: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    return {field: tuple(values) for field, values in grid.items()}


def find_tables(names: Sequence[str] | None, path: str, out: str) -> list[Table]:
    """The tables of these names, or, without names, those whose runs are in a folder.

    Args:
      names: of tables; empty or None for none.
      path: see `registry`.
      out: folder of a sweep.

    Raises:
      UserError: a name is unknown, or the folder holds no runs.
    """
    known = registry(path)
    if names:
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--table={unknown[0]} is unknown: choose of {', '.join(known)}")
        return [known[name] for name in names]
    saved = sorted(Path(out).glob(f"*/{TABLE_FILE}"))
    if not saved:
        raise UserError(f"--out={out} holds no runs of a sweep")
    return [known.get(file.parent.name) or load_table(file) for file in saved]
