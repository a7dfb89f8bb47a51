"""Whether what is stored still is what its source gives."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data import identity, records
from fedasr.data.listing import UTTERANCES_FILE
from fedasr.data.preparation.conversion import Converter, Skip
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError


def verify(
    directory: str | os.PathLike[str], source: Iterable[Utterance | Rejected] | None
) -> dict[str, Any]:
    """Reads all of a prepared corpus, and converts its source again to compare.

    Args:
      directory: the corpus.
      source: what it was prepared from; None where that can only be read, such as synthetic speech.

    Returns:
      {"stored": utterances, "damaged": [message], "compared", "same", "different": [{"id", "why"}],
      "no_longer_there": ids that are stored and that the source does not give, "new": ids that the
      source gives and that are neither stored nor were skipped}; the corpus is what its source
      gives if all but the numbers are empty.

    Raises:
      UserError: the folder is no prepared corpus, or does not list its utterances.
    """
    directory = Path(directory)
    metadata = records.read_metadata(directory)
    opened = {split: records.ArrayRecordCorpus(directory, split) for split in metadata["splits"]}
    report: dict[str, Any] = {"stored": 0, "damaged": []}
    for corpus in opened.values():
        for user in range(len(corpus.sizes)):
            for index in range(int(corpus.sizes[user])):
                report["stored"] += 1
                try:
                    corpus.get(user, [index])
                except UserError as error:
                    report["damaged"].append(str(error))
    if source is None:
        return report
    places = _places(directory, opened)
    known = {line["id"] for line in _lines(directory / "skipped.jsonl")}
    converter = _converter(metadata)
    report |= {"compared": 0, "same": 0, "different": [], "no_longer_there": [], "new": []}
    seen: set[str] = set()
    for item in source:
        if isinstance(item, Rejected) or item.id in seen:
            continue
        place = places.get(item.id)
        if place is None:
            if item.id not in known:
                report["new"].append(item.id)
            continue
        seen.add(item.id)
        report["compared"] += 1
        problem = _difference(item, converter, opened, place)
        if problem is None:
            report["same"] += 1
        else:
            report["different"].append({"id": item.id, "why": problem})
    report["no_longer_there"] = sorted(set(places) - seen)
    return report


def is_same(report: dict[str, Any]) -> bool:
    """Whether a report of `verify` holds no difference."""
    return not any(isinstance(value, list) and value for value in report.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _places(
    directory: Path, opened: dict[str, records.ArrayRecordCorpus]
) -> dict[str, tuple[str, int, int]]:
    """{id: (split, user, index)} of what is stored, by the list that `prepare` wrote."""
    path = directory / UTTERANCES_FILE
    if not path.is_file():
        raise UserError(f"{directory} was prepared without {UTTERANCES_FILE}: prepare it again")
    users = {split: {u: i for i, u in enumerate(c.users)} for split, c in opened.items()}
    next_index: Counter[tuple[str, int]] = Counter()
    places = {}
    for line in _lines(path):
        user = users[line["split"]][line["user"]]
        places[line["id"]] = line["split"], user, next_index[line["split"], user]
        next_index[line["split"], user] += 1
    return places


def _converter(metadata: dict[str, Any]) -> Converter:
    """What converted the utterances of a corpus."""
    from fedasr.audio.features import LogMelConfig

    options = metadata["options"]
    names = {field.name for field in dataclasses.fields(Converter)}
    chosen = {name: value for name, value in options.items() if name in names}
    try:
        return Converter(**{**chosen, "features": LogMelConfig(**options["features"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"the corpus's options are of another version ({error})") from error


def _difference(
    item: Utterance,
    converter: Converter,
    opened: dict[str, records.ArrayRecordCorpus],
    place: tuple[str, int, int],
) -> str | None:
    """How an utterance differs from what is stored; None where it does not."""
    split, user, index = place
    try:
        converted = converter(item)
    except Skip as skip:
        reason, detail = skip.args
        return f"{reason}: {detail}"
    try:
        stored = opened[split].get(user, [index])[0]
    except UserError as error:
        return f"damaged: {error}"
    if opened[split].users[user] != identity.normalised_user(item.user):
        return f"the user is {item.user!r} now"
    if not np.array_equal(stored["labels"], converted.labels):
        return "another transcript"
    signal = stored[converter.store]
    if signal.shape != converted.signal.shape:
        return f"{len(converted.signal)} {converter.store} instead of {len(signal)}"
    if signal.tobytes() != converted.signal.tobytes():
        apart = np.abs(signal.astype(np.float64) - converted.signal.astype(np.float64)).max()
        return f"the {converter.store} differ by up to {apart:.6g}"
    return None
