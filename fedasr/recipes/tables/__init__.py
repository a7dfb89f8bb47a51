"""Tables of results: rows of runs, the grid that each row may choose from, and what came out.

`fedasr sweep` runs tables and collects them; `published` and `mini` beside this hold definitions.
Nothing here starts a run or reads a run's files: tables are expanded into `Run`s, and `Outcome`s
are put together into results, verdicts, Markdown, CSV and a picture.
"""

from fedasr.recipes.tables.definition import (
    COMPLETED,
    DIVERGED,
    FAILED,
    FIRST,
    MISSING,
    SECOND,
    STARTS,
    UNFINISHED,
    Outcome,
    Row,
    Run,
    Table,
    describe_point,
)
from fedasr.recipes.tables.expansion import (
    check,
    choose,
    expand,
    pending,
    possible,
    ready,
    size,
    undecided,
)
from fedasr.recipes.tables.plot import write_plot
from fedasr.recipes.tables.results import collect, verdict
from fedasr.recipes.tables.text import to_csv, to_markdown

__all__ = [
    "COMPLETED",
    "DIVERGED",
    "FAILED",
    "FIRST",
    "MISSING",
    "SECOND",
    "STARTS",
    "UNFINISHED",
    "Outcome",
    "Row",
    "Run",
    "Table",
    "check",
    "choose",
    "collect",
    "describe_point",
    "expand",
    "pending",
    "possible",
    "ready",
    "size",
    "to_csv",
    "to_markdown",
    "undecided",
    "verdict",
    "write_plot",
]
