"""The tokenizer of a pretrained model's folder, as this project has tokenizers: the blank is 0."""

import json
import os
from pathlib import Path
from typing import Any

from fedasr.errors import UserError
from fedasr.text.tokenizers import CharTokenizer, Tokenizer, read_subwords

# Private-use characters stand for a file's signs (begin, end, unknown), which are never written.
_SIGNS = 0xE000


def prepared_with(place: str) -> dict[str, str]:
    """What labels are to be written with, as arguments of `prepare`.

    Args:
      place: the folder of a model, or a file that `read_subwords` takes.

    Returns:
      {"alphabet": characters} or {"tokenizer": path}.

    Raises:
      UserError: there is no tokenizer.
    """
    folder = Path(place)
    if not folder.is_dir():
        return {"tokenizer": place}
    if (characters := _characters(folder)) is not None:
        return {"alphabet": characters}
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return {"tokenizer": str(folder / name)}
    raise UserError(
        f"{place} holds no tokenizer (vocab.json, tokenizer.json or tokenizer.model): fetch it "
        "with the model"
    )


def folder_tokenizer(place: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model's folder.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    found = prepared_with(os.fspath(place))
    if "alphabet" in found:
        return CharTokenizer(found["alphabet"])
    return read_subwords(found["tokenizer"])


def _characters(folder: Path) -> str | None:
    """The alphabet of a vocab.json of characters; None if it is of other tokens."""
    vocabulary = _json(folder / "vocab.json")
    if not vocabulary or (folder / "merges.txt").exists():
        return None
    said = {**_json(folder / "tokenizer_config.json"), **_json(folder / "config.json")}
    try:
        ids = {str(token): int(number) for token, number in vocabulary.items()}
        blank = int(said.get("pad_token_id", ids.get("<pad>", 0)))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/vocab.json is damaged ({error}): fetch it again") from error
    between = said.get("word_delimiter_token", "|")
    size = max([*ids.values(), int(said.get("vocab_size", 0)) - 1]) + 1
    tokens = [""] * size
    for token, number in ids.items():
        tokens[number] = " " if token == between else token
    if not any(len(t) == 1 and t.isalpha() for t in tokens):
        return None
    tokens = _lowered(tokens)
    written = [t if len(t) == 1 else chr(_SIGNS + i) for i, t in enumerate(tokens)]
    return "".join(c for i, c in enumerate(written) if i != blank)


def _lowered(tokens: list[str]) -> list[str]:
    """Texts are lower case here: letters that are all capitals stand for theirs."""
    letters = [t for t in tokens if len(t) == 1 and t.isalpha()]
    if any(t != t.upper() for t in letters):
        return tokens
    return [t.lower() if len(t) == 1 else t for t in tokens]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object: fetch it again")
    return found
