"""A model's folder as transformers loads it, and as `folders.open_source` reads it again."""

import base64
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedasr.errors import UserError
from fedasr.models.pretrained import folders
from fedasr.models.pretrained.registry import FAMILIES

_SIGNS = ("<s>", "</s>", "<unk>")  # what private-use characters stand for, in their order


def export_folder(model: Any, params: Any, alphabet: Mapping[str, Any], folder: str | Path) -> None:
    """Writes configuration, weights, tokenizer and what is said of the front end.

    Args:
      model: has the `name` of a family and `options` by name.
      params: of the model alone, nested dicts: factors of an adaptation are merged before.
      alphabet: {"characters": text} or {"subwords": options of a `SubwordTokenizer`}.
      folder: that is there, to write into.

    Raises:
      UserError: a model that transformers has no class for, or parameters of another one.
    """
    if model.name not in FAMILIES:
        raise UserError(
            f"the format huggingface is of models that came from there, and {model.name} did not: "
            "export it in the project's own format"
        )
    family, folder = FAMILIES[model.name], Path(folder)
    options = family.config(**model.options)
    said = family.describe(options)
    said["config.json"][folders.OWN] = dataclasses.asdict(options)
    said |= _tokenizer(alphabet, said["config.json"])
    for name, content in said.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
    folders.write_tensors(model.name, model.options, params, folder)


def _tokenizer(alphabet: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Files of the tokenizer."""
    if subwords := alphabet.get("subwords"):
        pieces = subwords["kind"] == "sentencepiece"
        name = "tokenizer.model" if pieces else "tokenizer.json"
        return {name: base64.b64decode(subwords["model"])}
    blank, signs = config["pad_token_id"], iter(_SIGNS)
    tokens = []
    for i, c in enumerate(alphabet["characters"]):
        if "\ue000" <= c <= "\uf8ff":
            c = next(signs, f"<sign {i}>")
        tokens.append("|" if c == " " else c)
    tokens.insert(blank, "<pad>")
    return {
        "vocab.json": {token: i for i, token in enumerate(tokens)},
        "tokenizer_config.json": {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "word_delimiter_token": "|",
            "do_lower_case": False,
        },
    }
