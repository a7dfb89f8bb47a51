"""Neural recordings of attempted speech or handwriting: recording days are the users of a corpus.

Two layouts are read.

*The competition layout* (Willett et al., Nature 620, 2023): folders `train`, `test` and
`competitionHoldOut`, which become splits, each with one MATLAB file a day. A file holds
`sentenceText` (a character matrix or a cell array, a sentence a row), the cell arrays `tx1` to
`tx4` (threshold crossings at four thresholds) and `spikePow` (spike band power), a matrix
[time bins of 20 ms, channels] per sentence, and `blockIdx` (each sentence's block). Only the fields
that the chosen areas name are needed.

*A manifest of arrays*, for recordings in any other form, such as the handwriting of Willett et al.
(Nature 593, 2021). JSON lines, one a sentence:

    {"session": "2019.05.08", "block": 3, "text": "the sentence", "split": "train",
     "features": "2019.05.08/sentences.mat", "array": "neuralActivityCube", "row": 7, "bins": 210}

`features` is a .npy, .npz or .mat file, relative to the manifest; `array` names the array in the
latter two. It is [time, channels], or [sentences, time, channels] with `row`; `bins` is the true
length where it is padded. `id` (default: the line's number) and `split` (default "train") may be
left out.

Features are z-scored by whole block over the sentences of one split: no label is used, but a
sentence's scale depends on later ones of its block, which an online decoder would not have. Noise
of training must come before smoothing, so smoothing, subsampling and windows are the model's
(`fedasr.models.recurrent`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedasr import text as text_lib
from fedasr.data.conversion import (
    Converted,
    Progress,
    Rejected,
    Skip,
    Utterance,
    check_feasible,
    labels_of,
)
from fedasr.data.corpus import valid_split_name
from fedasr.data.prepare import prepare_with
from fedasr.errors import UserError

SPLITS = ("train", "test", "competitionHoldOut")
BIN_SECONDS = 0.02
CHANNELS_FILE = "channels.json"
MAX_BROKEN = 0.25  # a sentence with NaN in more of its channels is left out


class Area(NamedTuple):
    """Channels start..stop-1 of a field of a day's file ("features" in a manifest's arrays)."""

    field: str
    start: int
    stop: int


# The speech motor area (6v) of the published recordings, whose decoder used these alone.
SPEECH_AREAS = (Area("tx1", 0, 128), Area("spikePow", 0, 128))


def parse_areas(text: str) -> tuple[Area, ...]:
    """Areas written as "tx1[0:128],spikePow[0:128]".

    Raises:
      UserError: it is not written so, or an area is empty.
    """
    areas = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\[(\d+):(\d+)\]\s*", part)
        if not match or int(match[2]) >= int(match[3]):
            raise UserError(f"areas {text!r}: write them as tx1[0:128],spikePow[0:128]")
        areas.append(Area(match[1], int(match[2]), int(match[3])))
    return tuple(areas)


# ----------------------------------------------------------------------------------- z-scores


class BlockReport(NamedTuple):
    """Channels of a block that carry nothing and are zero: not finite somewhere, or constant."""

    not_finite: tuple[int, ...]
    constant: tuple[int, ...]


def z_score_block(signals: Sequence[np.ndarray]) -> tuple[list[np.ndarray], BlockReport]:
    """Zero mean and unit variance of every channel over the bins of a block.

    Args:
      signals: the block's sentences, [time, channels] each.

    Returns:
      float32 arrays of the same shapes, and what was wrong. A channel that is NaN or infinite
      anywhere in the block, or constant, is zero in all of it.
    """
    joined = np.concatenate(signals).astype(np.float64)
    finite = np.isfinite(joined).all(axis=0)
    joined[:, ~finite] = 0.0
    mean, std = joined.mean(axis=0), joined.std(axis=0)
    # Rounding leaves a little variance in constant channels.
    alive = std > 1e-6 * np.maximum(1.0, np.abs(mean))
    scaled = np.where(alive, (joined - mean) / np.where(alive, std, 1.0), 0.0).astype(np.float32)
    ends = np.cumsum([len(signal) for signal in signals])[:-1]
    report = BlockReport(
        tuple(np.flatnonzero(~finite).tolist()), tuple(np.flatnonzero(finite & ~alive).tolist())
    )
    return np.split(scaled, ends), report


# ------------------------------------------------------------------------------------- a day


class Sentence(NamedTuple):
    """One sentence as recorded: `signal` [time, channels], or why there is none."""

    id: str
    text: str
    block: str
    split: str
    signal: np.ndarray | None
    reason: str = ""
    detail: str = ""


def read_day(path: Path, split: str, areas: Sequence[Area]) -> list[Sentence]:
    """The sentences of one MATLAB file in the competition layout.

    Raises:
      UserError: scipy is missing, the file cannot be read, a field is missing, or fields differ in
        their number of sentences.
    """
    fields = list(dict.fromkeys(area.field for area in areas))
    content = _load_matlab(path, ["sentenceText", "blockIdx", *fields])
    texts = [str(_plain(t)).strip() for t in np.ravel(content["sentenceText"])]
    blocks = [str(_plain(b)) for b in np.ravel(content["blockIdx"])]
    cells = {}
    for field in fields:
        if content[field].dtype != object:
            raise UserError(f"{path}: {field} is no cell array of [time, channels] matrices")
        cells[field] = list(np.ravel(content[field]))
    counts = {"sentenceText": len(texts), "blockIdx": len(blocks)}
    counts |= {field: len(of_field) for field, of_field in cells.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"{path}: the fields differ in their number of sentences: {counts}")
    sentences = []
    for i, (text, block) in enumerate(zip(texts, blocks, strict=True)):
        id = f"{split}/{path.stem}/{i:05d}"
        signal, problem = _chosen({field: cells[field][i] for field in fields}, areas)
        reason = "wrong_shape" if problem else ""
        sentences.append(Sentence(id, text, block, split, signal, reason, problem))
    return sentences


def _chosen(parts: dict[str, np.ndarray], areas: Sequence[Area]) -> tuple[np.ndarray | None, str]:
    """The chosen channels side by side, or what is wrong with the arrays."""
    lengths = set()
    for field, array in parts.items():
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiub":
            shape = getattr(array, "shape", None)
            return None, f"{field} is {shape}, not a matrix [time, channels] of numbers"
        lengths.add(len(array))
        stop = max(area.stop for area in areas if area.field == field)
        if array.shape[1] < stop:
            return None, f"{field} has {array.shape[1]} channels, channel {stop - 1} is wanted"
    if len(lengths) > 1:
        return None, f"the fields differ in length: {sorted(lengths)} bins"
    if lengths == {0}:
        return None, "no time bins"
    chosen = [parts[area.field][:, area.start : area.stop] for area in areas]
    return np.concatenate([part.astype(np.float32) for part in chosen], axis=1), ""


def _plain(value: Any) -> Any:
    """What a cell holds: MATLAB wraps everything in arrays."""
    while isinstance(value, np.ndarray):
        if value.size != 1:
            return "" if value.size == 0 else " ".join(str(v) for v in value.ravel())
        value = value.ravel()[0]
    return value


def _load_matlab(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("MATLAB files need scipy: install it (pip install scipy)") from None
    try:
        content = loadmat(path, variable_names=list(fields))
    except NotImplementedError:
        raise UserError(f"{path} is a MATLAB file of version 7.3: save it with -v7") from None
    except MemoryError:
        raise
    except Exception as error:  # scipy raises whatever the damaged bytes lead to
        raise UserError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if missing := [field for field in fields if field not in content]:
        raise UserError(f"{path} has no field {', '.join(missing)}")
    return content


# ----------------------------------------------------------------------------------- sources


class NeuralSessions:
    """Sentences of all days, as `fedasr.data.prepare.prepare_with` takes them.

    Iterating reads one day at a time. Sentences that cannot be used come out as `Rejected`:
    "wrong_shape", "non_finite_channels" (NaN in more than a quarter of the channels) and
    "bad_manifest_line". The converter adds its own reasons, such as "empty_text".

    Args:
      path: the folder of the competition layout, or a manifest (.jsonl).
      areas: channels to use; None for the speech motor area, or for all of a manifest's channels.

    Attributes:
      channels: of every sentence.
      name, fingerprint, total: as `prepare_with` takes them.
      notes: counts, complete once all is read: "nan_channels" and "constant_channels", pairs of a
        channel and a block in which it was set to zero.
      broken: {"SPLIT/DAY block B": {"nan": [...], "constant": [...]}}, the same by name.

    Raises:
      UserError: nothing to read there; while iterating: see `read_day`.
    """

    def __init__(self, path: str | os.PathLike[str], areas: Sequence[Area] | None = None) -> None:
        self.path = Path(path)
        self.notes: dict[str, int] = {}
        self.broken: dict[str, dict[str, list[int]]] = {}
        self.total: int | None = None
        if self.path.is_dir():
            self._files = [
                (file, split)
                for split in SPLITS
                for file in sorted(self.path.glob(f"{split}/*.mat"))
            ]
            if not self._files:
                raise UserError(f"{path} has no MATLAB files in {', '.join(SPLITS)}")
            self.areas: tuple[Area, ...] | None = tuple(areas or SPEECH_AREAS)
            self._lines: list[dict[str, Any] | Rejected] = []
            seen = [file for file, _ in self._files]
        else:
            self.areas = tuple(areas) if areas else None
            if self.areas and any(area.field != "features" for area in self.areas):
                raise UserError("areas of a manifest are written as features[0:192]")
            self._lines = _read_lines(self.path)
            self.total = len(self._lines)
            named = {line["features"] for line in self._lines if not isinstance(line, Rejected)}
            seen = [self.path, *(self.path.parent / name for name in sorted(named))]
        self.channels = self._channels()
        self.name = f"neural recordings {path}"
        states = [
            [str(f), f.stat().st_size, f.stat().st_mtime_ns] if f.is_file() else [str(f)]
            for f in seen
        ]
        told = json.dumps([states, self.areas])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def _channels(self) -> int:
        """Of the areas, or of the first line of a manifest."""
        if self.areas is not None:
            return sum(area.stop - area.start for area in self.areas)
        for line in self._lines:
            if not isinstance(line, Rejected):
                array = _load_array(self.path.parent / line["features"], line.get("array"))
                return int(array.shape[-1]) if array.ndim else 0
        return 0

    def __iter__(self) -> Iterator[Utterance | Rejected]:
        self.broken.clear()
        self.notes.clear()
        if self.path.is_dir():
            for file, split in self._files:
                yield from self._day(file.stem, read_day(file, split, self.areas or SPEECH_AREAS))
            return
        yield from (line for line in self._lines if isinstance(line, Rejected))
        lines = [line for line in self._lines if not isinstance(line, Rejected)]
        for session in sorted({line["session"] for line in lines}):
            yield from self._day(session, self._read_session(lines, session))

    def _day(self, day: str, sentences: Sequence[Sentence]) -> Iterator[Utterance | Rejected]:
        groups: dict[tuple[str, str], list[int]] = {}
        ready: list[Utterance | Rejected] = []
        for i, one in enumerate(sentences):
            reason, detail = one.reason, one.detail
            if one.signal is not None:
                bad = np.flatnonzero(~np.isfinite(one.signal).all(axis=0))
                channels = one.signal.shape[1]
                if channels != self.channels:
                    reason, detail = "wrong_shape", f"{channels} channels, not {self.channels}"
                elif len(bad) > MAX_BROKEN * channels:
                    reason = "non_finite_channels"
                    detail = f"{len(bad)} of {channels} channels, such as {bad[:8].tolist()}"
                else:
                    groups.setdefault((one.split, one.block), []).append(i)
            ready.append(Rejected(one.id, reason, detail))
        for (split, block), group in groups.items():
            recorded = [x for i in group if (x := sentences[i].signal) is not None]
            signals, report = z_score_block(recorded)
            self._report(f"{split}/{day} block {block}", report)
            for i, signal in zip(group, signals, strict=True):
                one, read = sentences[i], functools.partial(_recorded, signal)
                ready[i] = Utterance(one.id, day, one.text, one.split, read)
        yield from ready

    def _report(self, where: str, report: BlockReport) -> None:
        named = {"nan": list(report.not_finite), "constant": list(report.constant)}
        if not any(named.values()):
            return
        self.broken[where] = named
        for kind, channels in named.items():
            if channels:
                key = f"{kind}_channels"
                self.notes[key] = self.notes.get(key, 0) + len(channels)
        if named["nan"]:
            logging.getLogger(__name__).warning("%s: channels %s hold NaN", where, named["nan"])

    def _read_session(self, lines: Sequence[dict[str, Any]], session: str) -> list[Sentence]:
        sentences = []
        held: tuple[Any, Any] = (None, None)
        for line in lines:
            if line["session"] != session:
                continue
            where = self.path.parent / line["features"], line.get("array")
            if held[0] != where:
                held = where, _load_array(*where)
            signal, problem = _sentence(held[1], line, self.areas)
            sentences.append(
                Sentence(
                    line["id"],
                    line["text"],
                    str(line.get("block", "")),
                    line["split"],
                    signal,
                    "wrong_shape" if problem else "",
                    problem,
                )
            )
        return sentences


def _recorded(signal: np.ndarray) -> tuple[np.ndarray, float]:
    return signal, 1.0 / BIN_SECONDS


def _read_lines(path: Path) -> list[dict[str, Any] | Rejected]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the manifest {path} cannot be read: {error}") from error
    lines: list[dict[str, Any] | Rejected] = []
    for number, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            entry = json.loads(content)
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
            for key in ("session", "text", "features"):
                if not isinstance(entry.get(key), str) or (key != "text" and not entry[key]):
                    raise ValueError(f"{key} is missing or not a string")
            for key in ("row", "bins"):
                if key in entry and (type(entry[key]) is not int or entry[key] < 0):
                    raise ValueError(f"{key} is no whole number")
            entry = {"id": f"line {number}", "split": "train"} | entry
            if not valid_split_name(str(entry["split"])):
                raise ValueError(f"{entry['split']!r} cannot be the name of a split")
            entry["id"] = str(entry["id"])
            lines.append(entry)
        except ValueError as error:
            lines.append(Rejected(f"line {number}", "bad_manifest_line", str(error)))
    if not lines:
        raise UserError(f"the manifest {path} is empty: write one JSON object a line into it")
    return lines


def _load_array(path: Path, name: str | None) -> np.ndarray:
    """An array of a file; a UserError that names the file where there is none."""
    if path.suffix not in (".npy", ".npz", ".mat"):
        raise UserError(f"{path}: features are read from .npy, .npz and .mat files")
    if path.suffix != ".npy" and not name:
        raise UserError(f"{path} holds several arrays: name one with `array` in the manifest")
    if path.suffix == ".mat" and name:
        return _load_matlab(path, [name])[name]
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except KeyError:
        raise UserError(f"{path} has no array {name!r}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _sentence(
    array: np.ndarray, line: dict[str, Any], areas: Sequence[Area] | None
) -> tuple[np.ndarray | None, str]:
    if "row" in line:
        if array.ndim != 3:
            return None, f"row is given, but the array is {array.shape}"
        if line["row"] >= len(array):
            return None, f"row {line['row']} of {len(array)}"
        array = array[line["row"]]
    if "bins" in line:
        if array.ndim and line["bins"] > len(array):
            return None, f"{line['bins']} bins of {len(array)}"
        array = array[: line["bins"]]
    if areas is None and array.ndim == 2:
        areas = [Area("features", 0, array.shape[1])]
    return _chosen({"features": np.asarray(array)}, areas or [Area("features", 0, 0)])


# --------------------------------------------------------------------------------- converter


@dataclass(frozen=True)
class NeuralConverter:
    """Turns a sentence into what a corpus stores; see `fedasr.data.conversion.Converter`.

    channels: of every sentence. stride: bins per output frame of the model. min_bins: shorter
    sentences are left out. language, keep_letters: of the texts. lexicon: a pronouncing dictionary
    (see `fedasr.text.read_lexicon`) to write phonemes instead of letters, or "". lexicon_digest:
    of that file.
    """

    channels: int
    stride: int = 4
    min_bins: int = 8
    language: str = "en"
    keep_letters: bool = False
    pad_space: bool = False
    lexicon: str = ""
    lexicon_digest: str = ""
    store: str = "features"

    @property
    def characters(self) -> str | list[str]:
        """The alphabet of the labels."""
        if self.lexicon:
            return text_lib.PhonemeTokenizer().characters
        return text_lib.alphabet(self.language, self.keep_letters)

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape of the stored signal after axis 0."""
        return (self.channels,)

    @property
    def dtype(self) -> type:
        """Of the stored signal."""
        return np.float32

    def __call__(self, utterance: Utterance) -> Converted:
        """Converts one sentence.

        Raises:
          Skip: it cannot be used.
        """
        text = utterance.text
        letters = text_lib.alphabet(self.language, self.keep_letters)
        labels = labels_of(text, self.language, text_lib.CharTokenizer(letters), self.pad_space)
        if self.lexicon:
            words, _ = text_lib.normalize_text(text, self.language, self.keep_letters)
            phonemes, unknown = text_lib.pronounced(
                words, _lexicon(self.lexicon, self.lexicon_digest)
            )
            if unknown:
                raise Skip("unknown_words", f"{unknown} in {text!r}")
            labels = text_lib.PhonemeTokenizer().encode(phonemes, self.pad_space)
        signal, rate = utterance.audio()
        if len(signal) < self.min_bins:
            raise Skip("too_short", f"{len(signal)} bins, at least {self.min_bins}")
        check_feasible(labels, len(signal), self.stride)
        return Converted(signal.astype(np.float32), labels, len(signal) / rate, False)


@functools.lru_cache(maxsize=1)
def _lexicon(path: str, digest: str) -> dict[str, list[tuple[str, ...]]]:
    del digest  # a file that has changed is read again
    return text_lib.read_lexicon(path)


def prepare_sessions(
    source: NeuralSessions,
    out: str | os.PathLike[str],
    *,
    stride: int = 4,
    language: str = "en",
    keep_letters: bool = False,
    pad_space: bool = False,
    lexicon: str | os.PathLike[str] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes recordings as a corpus whose users are days; what is wrong is counted.

    The corpus gives "features" float32 [bins, channels], z-scored, and "labels" int32.
    Which channels were set to zero is listed in `channels.json` of the folder, if any were.

    Args:
      source: what to read. stride: bins per output frame of the model, all its steps together.
      lexicon: a pronouncing dictionary, for labels that are phonemes; sentences with a word that it
        does not have are skipped ("unknown_words").
      out, language, keep_letters, pad_space, workers, progress, overwrite: see
        `fedasr.data.prepare.prepare`.

    Returns:
      See `fedasr.data.prepare.prepare`; "notes" counts channels set to zero (`NeuralSessions`).
    """
    if stride < 1:
        raise UserError(f"stride must be at least 1, not {stride}")
    if lexicon:
        text_lib.read_lexicon(lexicon)  # a clear error if it is none
    converter = NeuralConverter(
        channels=source.channels,
        stride=stride,
        language=language,
        keep_letters=keep_letters,
        pad_space=pad_space,
        lexicon=os.fspath(lexicon or ""),
        lexicon_digest=hashlib.sha256(Path(lexicon).read_bytes()).hexdigest()[:16]
        if lexicon
        else "",
    )

    def write_broken(folder: Path) -> None:
        if source.broken:
            text = json.dumps(source.broken, indent=1)
            (folder / CHANNELS_FILE).write_text(text, encoding="utf-8")

    return prepare_with(
        converter,
        source,
        out,
        name=source.name,
        fingerprint=source.fingerprint,
        workers=workers,
        notes=source.notes,
        total=source.total,
        progress=progress,
        overwrite=overwrite,
        write_more=write_broken,
    )
