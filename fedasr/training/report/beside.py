"""Another run beside the report's own: what is kept of it, and the two in numbers."""

from collections.abc import Iterator
from pathlib import Path

from fedasr.training.logging import write_json_atomic
from fedasr.training.report.read import Record, mapping_at, number_at, read_object
from fedasr.training.report.tables import html_table
from fedasr.training.report.words import as_text, between_text, interval_text, percent_text

BESIDE_FILE = "beside.json"  # of the report's work directory: reports that follow show it, too


def keep_beside(workdir: Path, other: Path) -> bool:
    """Keeps another run's name and errors by user; False if it has none.

    Args:
      workdir: of the report.
      other: work directory of the run.
    """
    users = read_object(other / "users.json")
    if users:
        write_json_atomic(workdir / BESIDE_FILE, {"name": other.resolve().name, "users": users})
    return bool(users)


def read_beside(workdir: Path) -> tuple[str, Record] | None:
    """The other run's name and `users.json`; None if there is none."""
    found = read_object(workdir / BESIDE_FILE)
    users = mapping_at(found, "users")
    return (str(found.get("name", "")), users) if users else None


def beside_table(users: Record, split: str, name: str, theirs: Record) -> str:
    """Mean, worst tenth and gaps between groups of both runs; "" where there is nothing to compare.

    Args:
      users: `users.json` of the report's run. theirs: of the other, `name`.
    """
    ours, others = mapping_at(users, split), mapping_at(theirs, split)
    rows = [*_rates(ours, others), *_gaps(ours, others)]
    header = ("", "this run", "95% interval", name, "95% interval")
    return html_table(rows, header) if others and rows else ""


def _rates(ours: Record, others: Record) -> Iterator[tuple[str, ...]]:
    names = {"all": "All words", "mean": "Mean over users", "worst_decile": "Worst tenth"}
    for key, name in names.items():
        sides = [mapping_at(side, "wer") for side in (ours, others)]
        if any(number_at(side, key) is not None for side in sides):
            cells = [(percent_text(number_at(x, key)), interval_text(x, key)) for x in sides]
            yield name, *(text for pair in cells for text in pair)


def _gaps(ours: Record, others: Record) -> Iterator[tuple[str, ...]]:
    for column in mapping_at(ours, "columns"):
        sides = [mapping_at(mapping_at(side, "columns"), column) for side in (ours, others)]
        if any(number_at(side, "gap") is not None for side in sides):
            cells = [(_gap(side), between_text(side.get("gap_interval"))) for side in sides]
            yield f"Gap by {column}", *(text for pair in cells for text in pair)


def _gap(side: Record) -> str:
    gap = number_at(side, "gap")
    if gap is None:
        return "unknown"
    return f"{gap:.1f} points, {as_text(side.get('worst'))} over {as_text(side.get('best'))}"
