"""The report's utterances with the most errors, to be heard where there are recordings."""

import re
from collections.abc import Mapping

from fedasr.training.report.read import Record, number_at
from fedasr.training.report.words import as_text, escaped, missing_text

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def heard_section(found: Record) -> str:
    """A split's worst utterances, each with what was said, what was recognised, and its sound.

    Args:
      found: see `fedasr.training.heard`; "" of an empty one.
    """
    rows = found.get("utterances")
    rows = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    why = missing_text(found["why"]) if isinstance(found.get("why"), str) and found["why"] else ""
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("user", "said", "recognised", "errors", "sound"))
    body = "".join(_row(row) for row in rows)
    return (
        f"<details><summary>The utterances with the most errors ({len(rows)})</summary>{why}"
        f"<table><tr>{head}</tr>{body}</table></details>"
    )


def _row(row: Record) -> str:
    errors, words = number_at(row, "errors"), number_at(row, "words")
    cells = (
        escaped(row.get("reference") or "(nothing)"),
        escaped(row.get("hypothesis") or "(nothing)"),
        escaped(f"{as_text(errors)} of {as_text(words)} words"),
        _sound(row),
    )
    name = escaped(row.get("user", ""))
    if row.get("id"):
        name += f'<br><span class="note">{escaped(row["id"])}</span>'
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _sound(row: Record) -> str:
    wav, seconds = row.get("wav"), number_at(row, "seconds")
    length = "" if seconds is None else f"{seconds:.1f} s"
    if not isinstance(wav, str) or not _BASE64.fullmatch(wav):
        return length
    source = f"data:audio/wav;base64,{wav}"
    return f'<audio controls preload="none" src="{source}"></audio><br>{length}'
