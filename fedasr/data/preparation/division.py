"""Who is in which split, where the source does not say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from fedasr.data.preparation.parts import Row


def divide(
    rows: Iterable[Row], dev_fraction: float, test_fraction: float, seed: int
) -> tuple[dict[str, dict[str, list[Row]]], int]:
    """Rows by split (train first) and user, and how many users are in several splits."""
    rows = list(rows)
    named: dict[str, list[str]] = {}
    undivided: set[str] = set()
    for row in rows:
        if row.split is None:
            undivided.add(row.user)
        elif row.split not in named.setdefault(row.user, []):
            named[row.user].append(row.split)
    undivided -= set(named)
    default = {user: splits[0] for user, splits in named.items()}
    default |= held_out(undivided, dev_fraction, test_fraction, seed)

    by_split: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        split = default[row.user] if row.split is None else row.split
        by_split.setdefault(split, {}).setdefault(row.user, []).append(row)
    order = sorted(by_split, key=lambda split: (split != "train", split))
    several = sum(len(splits) > 1 for splits in named.values())
    return {split: by_split[split] for split in order}, several


def held_out(
    users: Iterable[str], dev_fraction: float, test_fraction: float, seed: int = 0
) -> dict[str, str]:
    """The split of each user: "train", "dev" or "test".

    Users are ordered by a hash of (seed, user); the first round(fraction * users) of them, but at
    least one for each fraction above 0, are test and dev. Fewer than three users are all "train".
    """
    order = sorted(users, key=lambda user: json_digest([seed, user]))
    counts = [
        max(1, round(fraction * len(order))) if fraction > 0 and len(order) >= 3 else 0
        for fraction in (test_fraction, dev_fraction)
    ]
    while sum(counts) >= max(len(order), 1):  # someone must be left to train
        counts[counts.index(max(counts))] -= 1
    test, dev = counts[0], sum(counts)
    return {
        user: "test" if i < test else "dev" if i < dev else "train" for i, user in enumerate(order)
    }


def json_digest(value: Any) -> str:
    """SHA-256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
