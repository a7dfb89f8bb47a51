"""How far a preparation is, on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from fedasr.data.utterances import Progress


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A progress bar on stderr that appears with the first report; nothing without rich."""
    try:
        from rich import console, progress
    except ImportError:
        yield lambda done, total: None
        return
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console.Console(file=sys.stderr),
        # A thread that draws imports at its own times: the lazy imports of other packages break it.
        auto_refresh=False,
    )
    task, drawn = None, 0.0

    def report(done: int, total: int | None) -> None:
        nonlocal task, drawn
        if task is None:
            bar.start()
            task = bar.add_task(description, total=total)
        bar.update(task, completed=done, total=total)
        if done == total or time.monotonic() - drawn > 0.2:
            bar.refresh()
            drawn = time.monotonic()

    try:
        yield report
    finally:
        if task is not None:
            bar.stop()
