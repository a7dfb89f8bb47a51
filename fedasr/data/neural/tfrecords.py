"""The release of CORP (Fan et al., NeurIPS 2023): TFRecord files, a folder a session day.

    tfrecords/SESSION/train/*.tfrecord, tfrecords/SESSION/test/*.tfrecord     seed model
    tfrecords/SESSION/*.tfrecord                                             recalibration

A record is a `tf.train.Example` with `inputFeatures` (float, bins x channels), `nTimeSteps` and
`transcription` (codes of characters, padded with 0; ">" is a space, "~" a full stop). Those of the
seed model are z-scored already. Those of recalibration are as recorded, and are scaled as in the
authors' program, by the ten sentences before (the first by itself), as an online decoder could.
The layout of speechBCI's own records is the same as the seed model's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data.neural.areas import Area, chosen_channels
from fedasr.data.neural.competition import Sentence
from fedasr.errors import UserError

STORED, ROLLING = "stored", "rolling"  # how a session's features are scaled
FLAT_SPLIT = "recalibration"  # of sessions without folders for train and test
SENTENCES = 10  # by which recordings are scaled
_POLYNOMIAL = 0x82F63B78  # of CRC-32C, reversed


def find_sessions(folder: Path) -> list[tuple[str, str, str, list[Path]]]:
    """(day, split, how it is scaled, its files) of a folder of sessions; [] if it is none."""
    found = []
    for session in sorted(path for path in folder.iterdir() if path.is_dir()):
        parts = [(part.name, part) for part in sorted(session.iterdir()) if part.is_dir()]
        scale = STORED if parts else ROLLING
        for split, part in parts or [(FLAT_SPLIT, session)]:
            if files := sorted(part.glob("*.tfrecord")):
                found.append((session.name, split, scale, files))
    return found


def read_session(
    day: str, split: str, files: Sequence[Path], areas: Sequence[Area] | None
) -> list[Sentence]:
    """The sentences of a session, in the order of the files and of their records.

    Args:
      day, split, files: of `find_sessions`. areas: of the field "features"; None for all channels.

    Raises:
      UserError: a file cannot be read, or holds something else.
    """
    sentences: list[Sentence] = []
    for file in files:
        for example in _examples(file):
            signal, text = _content(file, example)
            chosen = list(areas or [Area("features", 0, signal.shape[1])])
            picked, problem = chosen_channels({"features": signal}, chosen)
            id = f"{split}/{day}/{len(sentences):05d}"
            reason = "wrong_shape" if problem else ""
            sentences.append(Sentence(id, text, "", split, picked, reason, problem))
    return sentences


def channels_of(file: Path) -> int:
    """Channels of the first sentence of a file.

    Raises:
      UserError: see `read_session`, or there is none.
    """
    for example in _examples(file):
        return _content(file, example)[0].shape[1]
    raise UserError(f"{file} holds no sentence: remove it")


def rolling_z_scores(signals: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each sentence by mean and deviation of the ten before it; the first by its own.

    Args:
      signals: [time, channels] each, in the order in which they came.

    Returns:
      float32 arrays of the same shapes. A channel that did not change before is zero.
    """
    scaled = []
    for i, signal in enumerate(signals):
        before = np.concatenate(signals[max(0, i - SENTENCES) : i] or [signal]).astype(np.float64)
        mean, std = before.mean(axis=0), before.std(axis=0)
        alive = std > 1e-6 * np.maximum(1.0, np.abs(mean))
        values = np.where(alive, (signal - mean) / np.where(alive, std, 1.0), 0.0)
        scaled.append(values.astype(np.float32))
    return scaled


def _content(file: Path, example: Any) -> tuple[np.ndarray, str]:
    """A record's features, float32 [bins, channels], and its text."""
    fields = example.features.feature
    if missing := [n for n in ("inputFeatures", "nTimeSteps", "transcription") if n not in fields]:
        raise UserError(f"{file} has records without {', '.join(missing)}: it is no such release")
    values = np.asarray(fields["inputFeatures"].float_list.value, np.float32)
    bins = next(iter(fields["nTimeSteps"].int64_list.value), 0)
    if bins < 1 or len(values) % bins:
        raise UserError(f"{file}: {len(values)} features are no {bins} time bins")
    codes = list(fields["transcription"].int64_list.value)
    text = "".join(chr(code) for code in codes[: codes.index(0) if 0 in codes else None])
    return values.reshape(bins, -1), text


def _examples(file: Path) -> Iterator[Any]:
    """The examples of a TFRecord file; raises UserError where it is damaged."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        with open(file, "rb") as stream:
            while head := stream.read(12):
                length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
                if len(head) < 12 or _masked_crc(head[:8]) != struct.unpack("<I", head[8:])[0]:
                    raise UserError(f"{file} is damaged, or no TFRecord file: copy it anew")
                data, checksum = stream.read(length), stream.read(4)
                if len(data) < length or len(checksum) < 4:
                    raise UserError(f"{file} is cut short: copy it anew")
                yield tf_example_pb2.Example.FromString(data)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise UserError(f"{file} is damaged: {error}: copy it anew") from error


def _masked_crc(data: bytes) -> int:
    """CRC-32C of a few bytes as TFRecord files hold it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
