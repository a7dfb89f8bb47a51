"""The tables of algorithms: every row is a configuration that a run would take."""

import itertools
import math

import pytest

from fedasr.cli.sweep.definitions import registry
from fedasr.federated.algorithms import ALGORITHMS, option_names
from fedasr.recipes import mini_algorithms, tables
from fedasr.recipes.mini_algorithms import TABLES
from fedasr.training.builders import whole

ROWS = [(table, row) for table in TABLES.values() for row in table.rows]


@pytest.mark.parametrize(("table", "row"), ROWS, ids=lambda x: x.name)
def test_every_row_is_a_run(table, row):
    config = mini_algorithms.get_config(row.arguments)
    grid = table.grid if row.grid is None else row.grid
    point = {field: values[-1] for field, values in grid.items()}
    config.update_from_flattened_dict({**row.overrides, **point})
    whole.checked(config.to_dict())


def test_none_is_tuned_more_than_another():
    assert registry().keys() >= TABLES.keys()
    for table in TABLES.values():
        tables.check(table)
        grids = [table.grid if row.grid is None else row.grid for row in table.rows]
        assert len({math.prod(map(len, grid.values())) for grid in grids}) == 1
    rows = {row.name for row in TABLES["mini_algorithms"].rows}
    for skew, privacy in itertools.product(("natural", "words", "quantity"), ("no DP", "DP")):
        assert {f"{name}, {skew}, {privacy}" for name in ("FedAvg", "SCAFFOLD", "FedDyn")} <= rows
    assert len(rows) == 3 * (7 + 6)


def test_options_of_every_algorithm_can_be_set():
    assert mini_algorithms._OPTIONS.keys() == ALGORITHMS.keys()
    for name, options in mini_algorithms._OPTIONS.items():
        assert options.keys() <= set(option_names(name))
