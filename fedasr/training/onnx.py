"""A recogniser as an ONNX graph, from log-mel features to log probabilities of its tokens.

The graph has fixed shapes: one utterance, padded to `SECONDS`. Scores do not depend on padding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.audio.features import LogMelConfig, num_frames
from fedasr.errors import UserError
from fedasr.training.builders import models
from fedasr.training.config import Config

GRAPH, ABOUT = "model.onnx", "config.json"
SECONDS = 30.0  # of the longest recording
_LABELS = 4


def write(config: Config, params: Any, alphabet: dict[str, Any], folder: Path) -> None:
    """Writes `model.onnx` and a `config.json` that says what goes in and comes out.

    Inputs of the graph are "features", float32 [1, frames, mels], zeros beyond the recording, and
    "features_length", int32 [1]; outputs "log_probs", float32 [1, frames out, vocab], and
    "log_probs_length", int32 [1].

    Args:
      config, params, alphabet: see `fedasr.training.exporting.Model`.
      folder: that is there.

    Raises:
      UserError: jax2onnx is missing, the model has no scores in each frame, or what it computes
        cannot be written as ONNX.
    """
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError(
            f"--format=onnx needs jax2onnx ({error}): pip install 'fedasr[onnx]'"
        ) from error
    frames, mels = num_frames(round(SECONDS * 16_000)), LogMelConfig().num_mels
    function = scores_alone(config, params, frames, mels)
    inputs = [
        jax.ShapeDtypeStruct((1, frames, mels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    try:
        to_onnx(
            function,
            inputs,
            return_mode="file",
            output_path=str(folder / GRAPH),
            input_names=("features", "features_length"),
            output_names=("log_probs", "log_probs_length"),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {config.model.name!r} cannot be written as ONNX ({type(error).__name__}: "
            f"{reason}): --format=fedasr holds every model"
        ) from error
    about = {
        "format": "fedasr onnx",
        "inputs": {"features": [1, frames, mels], "features_length": [1]},
        "features": "log-mel of fedasr.audio.features.extract, normalised by utterance",
        "blank": 0,
        "alphabet": alphabet,
    }
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / ABOUT).write_text(text, encoding="utf-8")


def scores_alone(config: Config, params: Any, frames: int, mels: int) -> Any:
    """(features [1, frames, mels], length [1]) -> (log probabilities, their number), and no more.

    Raises:
      UserError: a model without scores of tokens in each frame.
    """
    scores = models.build_recogniser(config).scores
    if scores is None:
        raise UserError("--format=onnx holds models with scores in each frame (objective 'ctc')")

    def whole(features: jax.Array, length: jax.Array) -> Any:
        batch = {
            "features": features,
            "features_length": length,
            "labels": jnp.zeros((1, _LABELS), jnp.int32),
            "labels_length": jnp.zeros(1, jnp.int32),
            "mask": jnp.ones(1, bool),
        }
        return scores(params, batch)[:2]

    examples = np.zeros((1, frames, mels), np.float32), np.ones(1, np.int32)
    traced = jax.make_jaxpr(whole)(*examples)
    # Of the loss, whose loops ONNX would have to hold, nothing is needed.
    needed, _ = jax.interpreters.partial_eval.dce_jaxpr(traced.jaxpr, [True, True], True)
    return lambda *inputs: tuple(jax.core.eval_jaxpr(needed, traced.consts, *inputs))
