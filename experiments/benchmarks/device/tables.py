"""The results of a device: written as JSON and as tables after every figure."""

import datetime
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

_FINISHED = "done"


class Results:
    """What a run on a device has come to so far.

    Args:
      folder: of results. tiny: whether the sizes are small ones.
    """

    def __init__(self, folder: Path, tiny: bool) -> None:
        self._folder, self._tiny, self._device = folder, tiny, "device"
        self._stages: dict[str, dict[str, Any]] = {}
        self._about = {"date": datetime.date.today().isoformat(), "commit": _commit()}

    @property
    def path(self) -> Path:
        """Of the JSON; the tables lie beside it."""
        return self._folder / f"{self._device}{'-tiny' if self._tiny else ''}.json"

    def begin(self, name: str, title: str) -> None:
        """Goes on to a stage."""
        self._stages[name] = {"title": title, "status": "running", "seconds": 0.0, "rows": []}
        if name != "device":  # whose name is not known yet
            self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Takes a figure of the stage."""
        self._last()["rows"].append(row)
        if "device" in self._stages and len(self._stages) == 1:
            self._device = re.sub(r"[^a-z0-9]+", "-", row["kind"].lower()).strip("-")
        self._write()

    def end(self, status: str, seconds: float) -> None:
        """Closes the stage."""
        self._last().update(status=status, seconds=round(seconds, 1))
        self._write()

    def status(self, name: str) -> str:
        """Of a stage, with what did not hold."""
        stage = self._stages[name]
        wrong = sum(row.get("ok") is False for row in stage["rows"])
        return stage["status"] + (f", {wrong} of its checks failed" if wrong else "")

    def good(self) -> bool:
        """Whether every stage was done and every check in it held."""
        return all(self.status(name) == _FINISHED for name in self._stages)

    def _last(self) -> dict[str, Any]:
        return next(reversed(self._stages.values()))

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found = {**self._about, "tiny": self._tiny, "stages": self._stages}
        _replace(self.path, json.dumps(found, indent=1) + "\n")
        _replace(self.path.with_suffix(".md"), "\n".join(self._page()) + "\n")

    def _page(self) -> list[str]:
        lines = [f"# {self._device}{', tiny sizes' if self._tiny else ''}", ""]
        lines += [f"Measured {self._about['date']} at {self._about['commit']}.", ""]
        lines += ["```bash", "experiments/benchmarks/device.sh", "```"]
        for name, stage in self._stages.items():
            lines += ["", f"## {stage['title']}", "", f"{self.status(name)}, {stage['seconds']} s."]
            lines += ["", *table(stage["rows"])] if stage["rows"] else []
        return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a table of Markdown; a single one lies on its side."""
    if len(rows) == 1:
        flat = _flat(rows[0])
        lines = [f"| {key} | {_text(value)} |" for key, value in flat.items()]
        return ["| figure | value |", "|---|---|", *lines]
    flat_rows = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat_rows for name in row))
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return head + [
        "| " + " | ".join(_text(row.get(name, "")) for name in names) + " |" for row in flat_rows
    ]


def _flat(row: dict[str, Any], within: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{within}{key} ")
        else:
            found[f"{within}{key}"] = value
    return found


def _text(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")[:120]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "an unknown commit"
    return done.stdout.strip() or "an unknown commit"


def _replace(path: Path, text: str) -> None:
    """Writes a file in one step: whoever ends the run leaves the old or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
