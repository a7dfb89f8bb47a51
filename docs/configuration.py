"""The page of the configuration, made from the declared fields.

Defaults, kinds and units are those of the declaration, the range is what its check says of values
that are out of it. The words are those of the declaration (`Field.doc`, docstrings of sections),
unless `WORDS` below has better ones.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from fedasr.fields import Field, flatten
from fedasr.training import config

# Where the declaration says nothing, or something that needs the lines around it: by field or, for
# several sections, by the last part of the name (which gives way to the declaration).
WORDS = {
    "name": "The run's: a part of its work directory's name.",
    "seed": "Everything random follows from it. Keys hold 32 bits: beyond, two seeds would be one.",
    "algorithm": '"federated", or "central": the same data with the users forgotten.',
    "rounds": 'Federated rounds; unused by "central".',
    "cohort": "Expected number of users in a round.",
    "devices": "How many are used; 0: all; on a CPU, one for each core.",
    "model_devices": "So many devices train a client together, for models too large for one.",
    "data.task": "What is said in the synthetic corpus.",
    "data.train": "Split of the training users: a split expression.",
    "data.eval": "Splits that are evaluated.",
    "model.name": "Which encoder.",
    "augment.enabled": "Whether SpecAugment masks the training features.",
    "augment.options": "SpecAugment's: numbers and widths of masks, and warps.",
    "seed_training.split": "Split of the users whose data trains the seed model, without privacy.",
    "steps": "Steps of training.",
    "seed_training.steps": "Steps of training before the federated rounds; 0: none.",
    "batch_size": "Utterances in a batch.",
    "optimizer": "Its name.",
    "learning_rate": "The optimiser's.",
    "decay_steps": "Steps between decays of the learning rate by decay_rate; 0: constant.",
    "decay_start": "Rounds at the constant learning rate; then it decays.",
    "decay_rounds": "Rounds between decays of the learning rate by decay_rate.",
    "decay_rate": "What the learning rate is multiplied by at each decay.",
    "grad_clip": "Largest global norm of a gradient; a larger one is scaled down.",
    "client.decay_start": "Rounds at the constant learning rate; then it decays.",
    "client.decay_rounds": "Rounds between decays of the learning rate by decay_rate.",
    "server.decay_start": "Rounds at the constant learning rate; then it decays.",
    "server.decay_rounds": "Rounds between decays of the learning rate by decay_rate.",
    "seed_training.decay_steps": "Steps between decays by decay_rate; 0: constant.",
    "central.decay_steps": "Steps between decays by decay_rate; 0: constant.",
    "client.steps": "Steps of a client in a round; 0: use epochs.",
    "client.epochs": "Passes over a client's data in a round; 0: use steps.",
    "client.max_steps": "With epochs, at most so many steps; 0: no limit.",
    "client.weighting": 'How clients count: "uniform", or "examples", without privacy only.',
    "compression.download": "Format of what clients receive and keep.",
    "compression.upload": "Format of clients' updates.",
    "compression.share": "Share of the weight matrices, drawn by every client and round.",
    "partial.mode": "Which variables clients train.",
    "partial.patterns": 'With "fixed": regular expressions, searched for in variables\' paths.',
    "partial.groups": 'With "round": the number of groups.',
    "partial.share": 'With "user": the share of the weight matrices.',
    "local.patterns": "Regular expressions, searched for in variables' paths: ('^input_layer/',).",
    "privacy.clip_norm": "Bound C of the norm of a user's update.",
    "privacy.enabled": "False: no clipping of client updates, no noise.",
    "privacy.sigma": "Noise on the mean update, over the clip norm.",
    "privacy.sampler": 'Who takes part: each user by chance ("poisson"), so many without '
    'replacement ("fixed"), users in turn ("shuffled"), all ("everyone", with cohort=0).',
    "privacy.bits": 'Of each coordinate that a client sends, with "skellam".',
    "privacy.bands": "Of banded noise; 0: as many as rounds between a user's turns, at most 32.",
    "privacy.buffers": "Of buffered linear Toeplitz noise.",
    "privacy.delta": "Of (epsilon, delta).",
    "privacy.adaptive.enabled": "Whether the clip norm follows a quantile of the update norms.",
    "privacy.adaptive.quantile": "Which one.",
    "privacy.adaptive.rate": "Step of the bounds' logarithm.",
    "privacy.adaptive.warmup_rate": "That step during the warm-up.",
    "evaluation.every": "Rounds between evaluations; 0: only before and after.",
    "evaluation.batch_size": "Utterances evaluated together.",
    "evaluation.while_training": "Splits that are evaluated while training goes on.",
    "checkpoint.every": "Rounds between checkpoints.",
    "checkpoint.seed_every": "Steps of central training between checkpoints.",
    "checkpoint.keep": "How many are not deleted.",
}


def page() -> str:
    """The page's Markdown: a table for each section."""
    said = declared_words(config)
    sections: dict[str, list[str]] = {}
    for path, field in flatten(config.fields()).items():
        section, _, name = path.rpartition(".")
        cells = (
            f"`{name}`",
            words(path, said),
            _default(field),
            field.unit,
            allowed(field),
        )
        sections.setdefault(section, []).append("| " + " | ".join(map(_cell, cells)) + " |\n")
    parts = [_HEAD]
    for section, rows in sections.items():
        parts.append(f"\n## {f'`{section}`' if section else 'The run'}\n\n")
        if section in said:
            parts.append(f"{said[section]}\n\n")
        parts += [
            "| field | what it is | default | unit | what it may be |\n|---|---|---|---|---|\n"
        ]
        parts += rows
    return "".join(parts)


_HEAD = """# Configuration

Every field of a run's configuration, made from the declarations in `fedasr/training/config.py`.
Each is a flag of the programs that take `--config`, as in `--config.client.steps=8`, and is checked
before anything else happens.
"""


def words(path: str, said: Mapping[str, str]) -> str:
    """What a field is, in words; "" if nobody says.

    Args:
      path: "section.name".
      said: by declarations, by path.
    """
    return WORDS.get(path) or said.get(path) or WORDS.get(path.rpartition(".")[2], "")


def _default(field: Field) -> str:
    value = field.default
    if isinstance(value, Mapping):
        return "; ".join(f"`{name}={option!r}`" for name, option in value.items()) or "none"
    return f"`{value!r}`"


def allowed(field: Field) -> str:
    """What a field may hold, in the words of its own check."""
    if field.kind in ("whole number", "number"):
        huge = 10**30 if field.kind == "whole number" else 1e300
        found = [str(field.check(value)) for value in (-huge, huge)]
        bounds = " and ".join(text.removeprefix("must be ") for text in found)
        return f"{field.kind}, {bounds}"
    found = str(field.check("\n"))
    if " one of " in found:
        return "one of " + ", ".join(f"`{name}`" for name in re.findall(r"'([^']*)'", found))
    return field.kind


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def declared_words(module: Any) -> dict[str, str]:
    """What declarations say of fields and sections, by path.

    Args:
      module: whose `fields` returns them, and whose `Config` is the dataclass of dataclasses that
        they stand in.
    """
    said = {
        path: _sentence(field.doc) for path, field in flatten(module.fields()).items() if field.doc
    }

    def walk(kind: Any, prefix: str) -> None:
        for field in dataclasses.fields(kind):
            if inner := field.metadata.get("section"):
                said[f"{prefix}{field.name}"] = " ".join(_summary(inner).split())
                walk(inner, f"{prefix}{field.name}.")

    walk(module.Config, "")
    return said


def _summary(kind: Any) -> str:
    """A docstring up to its attributes."""
    return (inspect.getdoc(kind) or "").partition("\nAttributes:")[0]


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith((".", ":")) else f"{text}."
