"""The utterances with the most errors, with their recordings where the prepared data has them.

`worst.json` of a work directory: {split: {"why", "utterances"}}. Each utterance has "user",
"utterance", "id", "reference", "hypothesis", "errors", "words", "seconds" and "wav": base64 of a
WAV file, or "" with the reason in "why".
"""

import base64
import io
import os
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedasr.audio.features import LogMelConfig
from fedasr.data.records import open_corpus, read_metadata
from fedasr.evaluation.alignment import errors_of, words_of
from fedasr.evaluation.hypotheses import Hypothesis

WORST_FILE = "worst.json"
_WORST = 10
_MOST_SAMPLES = 1_500_000  # of a split: 3 MB of audio, a bit over 90 s; a third more as base64


def worst_of(found: Sequence[Hypothesis]) -> list[tuple[Hypothesis, int]]:
    """The ten utterances with the most word errors, with these; the shorter first among equals."""
    counted = [(one, errors_of(one.words())) for one in found]
    wrong = [(one, errors) for one, errors in counted if errors]
    wrong.sort(key=lambda x: (-x[1], len(words_of(x[0].reference)), x[0].user, x[0].utterance))
    return wrong[:_WORST]


def to_wav(samples: np.ndarray, rate: int) -> bytes:
    """int16 [samples] as a WAV file, one channel."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.asarray(samples, "<i2").tobytes())
    return file.getvalue()


def describe_worst(
    directory: str | os.PathLike[str], split: str, found: Sequence[Hypothesis]
) -> dict[str, Any]:
    """The split's worst utterances, as `worst.json` has them.

    Args:
      directory: of the prepared data.
      split: of which all `found` are, numbered as in the corpus that it names.
      found: every utterance.
    """
    worst = worst_of(found)
    options = read_metadata(directory).get("options", {})
    rows: list[dict[str, Any]] = [
        {
            "user": one.user,
            "utterance": one.utterance,
            "id": one.id,
            "reference": one.reference,
            "hypothesis": one.hypothesis,
            "errors": errors,
            "words": len(words_of(one.reference)),
            "seconds": one.seconds,
            "wav": "",
        }
        for one, errors in worst
    ]
    if not rows:
        return {"why": "", "utterances": []}
    if not isinstance(options.get("features"), Mapping):
        return {"why": "They are no sound.", "utterances": rows}
    if options.get("store") != "audio":
        why = (
            "They cannot be heard here: the prepared data holds features. Data that is prepared "
            "with --store=audio has recordings."
        )
        return {"why": why, "utterances": rows}
    corpus = open_corpus(directory, split, audio=True)
    places, left = {user: i for i, user in enumerate(corpus.users)}, _MOST_SAMPLES
    rate = LogMelConfig(**options["features"]).sample_rate
    for row in rows:
        (example,) = corpus.get(places[row["user"]], [row["utterance"]])
        samples = example["features"].reshape(-1)[: int(example["samples"])]
        row["seconds"] = len(samples) / rate
        if len(samples) <= left:
            left -= len(samples)
            row["wav"] = base64.b64encode(to_wav(samples, rate)).decode("ascii")
    told = all(row["wav"] for row in rows)
    why = "" if told else "Those without a recording would make this page too large."
    return {"why": why, "utterances": rows}
