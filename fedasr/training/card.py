"""A model card: what a model is, what it was trained on, and what is promised to its users."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data.records import read_metadata as read_corpus_metadata
from fedasr.errors import UserError
from fedasr.models import peft
from fedasr.privacy import accounting, ledger
from fedasr.training import describe
from fedasr.training.builders import clients
from fedasr.training.config import Config
from fedasr.training.workdir import SUMMARY_FILE, read_json

_HERE = 2  # folders above a checkpoint's, in which a summary may lie


def text(config: Config, metadata: Mapping[str, Any], path: Path, params: Any) -> str:
    """The card, Markdown.

    Args:
      config, metadata: of the checkpoint.
      path: where it lies; a summary beside it has the error rates.
      params: of the model.
    """
    count = sum(int(np.size(x)) for x in _leaves(params))
    parts = [
        f"# {config.name}",
        f"A speech recogniser ({config.model.name}, {count:,} parameters), trained by fedasr: "
        f"{_how(config, metadata)}.",
        "## Trained on",
        *_data(config),
        "## Error rates",
        *_rates(path),
        "## Privacy",
        *_privacy(config, metadata),
    ]
    return "\n\n".join(parts) + "\n"


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return [leaf for inner in tree.values() for leaf in _leaves(inner)]
    return [tree]


def _how(config: Config, metadata: Mapping[str, Any]) -> str:
    units = metadata.get("units", 0)
    if metadata.get("stage") == "seed" or not config.has_rounds:
        found = f"{units:,} steps on pooled data"
    else:
        found = f"{units:,} federated rounds of {config.cohort or 'all'} users"
    adaptation = clients.peft_config(config)
    if adaptation.kind != "full":
        said = peft.describe(adaptation)
        numbers = ", ".join(f"{k} {v}" for k, v in said.items() if k != "kind" and v != ())
        found += f", adapted by {adaptation.kind}" + (f" ({numbers})" if numbers else "")
    return found + (", from a model that was trained before" if config.init_from else "")


def _data(config: Config) -> list[str]:
    """What is known of the data: its name, its users and hours, by split; never a path."""
    directory = Path(config.data.dir) if config.data.dir else None
    if directory is None:
        return [f"The synthetic corpus {config.data.task!r}, split {config.data.train!r}."]
    named = f"the split {config.data.train!r}"
    try:
        found = read_corpus_metadata(directory)
    except UserError:
        return [f"A prepared corpus with the identity {config.data.identity}, {named}."]
    rows = [
        f"* {split}: {value['users']:,} users, {value['examples']:,} utterances"
        for split, value in found["splits"].items()
    ]
    return [
        f"The corpus {found.get('name', 'without a name')!r}, {named}. It has",
        "\n".join(rows),
    ]


def _rates(path: Path) -> list[str]:
    """Word error rates, where a summary lies beside the checkpoint."""
    folder = path.absolute()
    for place in (folder, *list(folder.parents)[:_HERE]):
        summary = read_json(place / SUMMARY_FILE)
        if summary and isinstance(summary.get("wer"), Mapping):
            return ["\n".join(f"* WER {k}: {v:.2f}%" for k, v in summary["wer"].items() if v)]
    return ["Not known: evaluate the model on speech like yours before you use it."]


def _privacy(config: Config, metadata: Mapping[str, Any]) -> list[str]:
    """What every run behind the model promises, in all, and what no figure is about."""
    kept = metadata.get("ledger")
    if kept is None:
        return ["Unknown: the checkpoint has no ledger. Take it to promise nothing."]
    entries = ledger.from_data([*kept["earlier"], *kept["own"]])
    delta = config.privacy.delta
    lines = [f"User-level differential privacy at delta {delta:g}, as training was simulated:"]
    rows = [f"* {_entry(entry, delta)}" for entry in entries if entry.rounds]
    if rows:
        lines.append("\n".join(rows))
    if not kept["known"]:
        lines.append("What the model that training started from was trained on is not known.")
    elif len(rows) > 1:
        spent = accounting.epsilon_in_words(ledger.total(entries, delta).epsilon)
        lines.append(f"Users who were in all of them: epsilon {spent}.")
    for where, _, _ in entries[-1].deployed if entries else ():
        epsilon = accounting.epsilon_in_words(ledger.total_deployed(entries, where, delta))
        lines.append(
            f"The same clipping and noise, if {where[0]:,} of {where[1]:,} users took part in each "
            f"round, would be epsilon {epsilon}: a statement about that deployment, not about this "
            "model's users."
        )
    limits = describe.not_covered(config, bool(kept["known"]))
    if config.privacy.enabled and config.privacy.noise_seed != "secret":
        limits.append(
            "whoever has the configuration, the data and the start of the run: they can compute "
            "its noise (privacy.noise_seed)"
        )
    if not config.privacy.enabled and config.has_rounds:
        lines.append("The federated rounds had no clipping and no noise: they promise nothing.")
    lines.append("Not covered:")
    lines.append("\n".join(f"* {limit}" for limit in limits))
    return lines


def _entry(entry: ledger.Entry, delta: float) -> str:
    epsilon = accounting.epsilon_in_words(
        ledger.composed([(entry.event, entry.relation)], delta)[0]
    )
    unit = "rounds" if entry.stage == "rounds" else f"steps ({entry.stage})"
    return (
        f"{entry.users.count:,} users, {entry.rounds:,} {unit}: epsilon {epsilon} "
        f"({entry.sampling})"
    )
