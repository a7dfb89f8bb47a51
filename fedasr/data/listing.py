"""What `utterances.jsonl` of a prepared corpus says of the utterances of a split."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedasr.data import records, splits

UTTERANCES_FILE = "utterances.jsonl"


@dataclass(frozen=True)
class Listed:
    """A stored utterance: id and seconds of audio, and what else its source said."""

    id: str
    seconds: float
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_listing(
    directory: str | os.PathLike[str], split: str
) -> tuple[dict[str, list[Listed]], bool]:
    """The utterances of each user of a split, and whether they are in the split's order.

    Args:
      directory: of a prepared corpus.
      split: stored, or an expression; that has all the users' utterances of the stored splits that
        it names, so that only what a user's utterances have in common holds for it.

    Returns:
      ({user: utterances}, whether `utterances[i]` is example i of the user). Empty for a corpus
      without a list, or with a damaged one: it is for reports alone.
    """
    metadata = records.read_metadata(directory)
    names = splits.stored_names(split, metadata["splits"])
    # The writer's spelling: most lines of a large corpus are of other splits.
    marks = tuple(f'{{"split": {json.dumps(name)},'.encode() for name in names)
    found: dict[str, list[Listed]] = defaultdict(list)
    try:
        with open(Path(directory) / UTTERANCES_FILE, "rb") as file:
            for line in file:
                if not line.startswith(marks):
                    continue
                row = json.loads(line)
                said = {str(k): str(v) for k, v in (row.get("metadata") or {}).items()}
                found[row["user"]].append(Listed(row["id"], float(row["seconds"]), said))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, False
    return dict(found), split in metadata["splits"]
