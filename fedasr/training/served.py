"""Who a run serves: hypotheses and errors by user of its last evaluation, on disk and in short."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.audio.features import LogMelConfig
from fedasr.data.corpus import Corpus, all_lengths
from fedasr.data.listing import read_listing
from fedasr.data.records import read_metadata
from fedasr.evaluation import confusions
from fedasr.evaluation.hypotheses import HYPOTHESES_FILE, Hypothesis, write_hypotheses
from fedasr.evaluation.users import by_user, columns_of, groups, statistics
from fedasr.training.evaluation import Decoded
from fedasr.training.heard import WORST_FILE, describe_worst
from fedasr.training.logging import to_json, write_json_atomic

USERS_FILE = "users.json"
_SHORT = ("users", "all", "mean", "sd", "p10", "p50", "p90", "worst_decile", "intervals")


def hypotheses_of(
    directory: str | Path, split: str, corpus: Corpus, decoded: Sequence[Decoded]
) -> list[Hypothesis]:
    """Decoded utterances with what the prepared data says of them, by user and number.

    Args:
      directory: of the prepared data.
      split: that was decoded, `corpus`.
      decoded: see `fedasr.training.evaluation.Evaluator.decoded`.
    """
    listed, in_order = read_listing(directory, split)
    users, found = corpus.users, []
    for one in sorted(decoded, key=lambda x: (x.user, x.number)):
        user = users[one.user]
        rows = listed.get(user, [])
        known: dict[str, Any] = {}
        if in_order and one.number < len(rows):
            row = rows[one.number]
            known = {"id": row.id, "seconds": row.seconds, "metadata": row.metadata}
        elif rows:
            said = [row.metadata.items() for row in rows]
            known = {"metadata": dict(set(said[0]).intersection(*said[1:]))}
        texts = (one.reference, one.hypothesis, one.frames)
        found.append(Hypothesis(split, user, one.number, *texts, **known))
    return found


def training_minutes(directory: str | Path, corpora: Sequence[Corpus]) -> dict[str, float] | None:
    """Minutes of speech of every user in the corpora that were trained on; None if not speech.

    Args:
      directory: of the prepared data.
      corpora: those of the rounds, and of the seed if there was one, each with who spoke as user.
    """
    options = read_metadata(directory).get("options", {})
    if not isinstance(options.get("features"), Mapping):
        return None
    config = LogMelConfig(**options["features"])
    seconds = config.hop_samples / config.sample_rate
    found: dict[str, float] = {}
    for corpus in corpora:
        frames = all_lengths(corpus).get("features")
        if frames is None:
            return None
        until = np.append(0, np.cumsum(np.asarray(frames, np.int64)))
        ends = np.cumsum(np.asarray(corpus.sizes))
        each = until[ends] - until[ends - np.asarray(corpus.sizes)]
        for user, count in zip(corpus.users, each.tolist(), strict=True):
            found[user] = found.get(user, 0.0) + count * seconds / 60
    return found


def describe_users(
    found: Sequence[Hypothesis], minutes: Mapping[str, float] | None
) -> dict[str, Any]:
    """Errors by user and group in one split.

    Returns:
      {"wer", "cer" (`fedasr.evaluation.users.statistics`), "columns" {column: `groups` of word
      error rates}, "confusions" {"words", "characters"}, "by_user" [{"user", "utterances", "words",
      "characters", "word_errors", "char_errors", "wer", "cer", "metadata", "training_minutes"}]}.
    """
    users = by_user(found, minutes)
    columns = columns_of(users)
    return {
        "wer": statistics(users, "wer"),
        "cer": statistics(users, "cer"),
        "columns": {name: groups(users, values) for name, values in columns.items()},
        "confusions": confusions.both(found),
        "by_user": [{**asdict(user), "wer": user.wer, "cer": user.cer} for user in users],
    }


def in_short(described: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says of a split."""
    gaps = {
        name: {key: value for key, value in column.items() if key != "groups"}
        for name, column in described["columns"].items()
        if column["gap"] is not None
    }
    wer = described["wer"]
    return {**{key: wer[key] for key in _SHORT if key in wer}, "gaps": gaps}


def write_served(
    workdir: Path,
    directory: Path,
    corpora: Mapping[str, Corpus],
    decoded: Mapping[str, Sequence[Decoded]],
    trained: Sequence[Corpus],
) -> dict[str, Any]:
    """Writes hypotheses, errors by user and the worst; returns the summary's part, by split.

    Args:
      workdir: where they are written.
      directory: of the prepared data.
      corpora: evaluated, by split. decoded: their utterances.
      trained: corpora that were trained on.
    """
    minutes = training_minutes(directory, trained)
    found = {
        split: hypotheses_of(directory, split, corpora[split], utterances)
        for split, utterances in decoded.items()
    }
    write_hypotheses(workdir / HYPOTHESES_FILE, (one for each in found.values() for one in each))
    described = {split: describe_users(each, minutes) for split, each in found.items()}
    write_json_atomic(workdir / USERS_FILE, to_json(described))
    worst = {split: describe_worst(directory, split, each) for split, each in found.items()}
    write_json_atomic(workdir / WORST_FILE, worst)
    return to_json({split: in_short(each) for split, each in described.items()})
