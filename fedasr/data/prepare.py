"""Turns utterances into a corpus of features on disk, once, counting whatever is left out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fedasr import text as text_lib
from fedasr.data import corpus as corpus_lib
from fedasr.errors import UserError

if TYPE_CHECKING:  # numpy only at run time: features come from JAX, loaded when they are computed
    from fedasr.audio.features import LogMelConfig
    from fedasr.data.synthetic import SyntheticConfig

Progress = Callable[[int, int | None], None]

SKIPPED_FILE = "skipped.jsonl"
_UNFINISHED = ".unfinished"
_LOCK = ".lock"
_PREPARE_VERSION = 1  # part of the fingerprint: raise it when the same input gives other data


@dataclass(frozen=True)
class Utterance:
    """One recording with its transcript.

    Attributes:
      id: unique within the corpus.
      user: who speaks; privacy and federated learning are per user.
      text: transcript as written; `fedasr.text` normalises it.
      split: the split it belongs to, or None to leave the choice to `prepare`.
      audio: returns (samples float32 [samples] or [samples, channels] in [-1, 1], rate in Hz).
    """

    id: str
    user: str
    text: str
    split: str | None
    audio: Callable[[], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Rejected:
    """An input that its source could not turn into an utterance; `prepare` counts it.

    Attributes:
      id: where it came from.
      reason: the count it belongs to.
      detail: one line for people.
    """

    id: str
    reason: str
    detail: str


class _Skip(Exception):
    """Leaves one utterance out: (reason, detail)."""


def prepare(
    utterances: Iterable[Utterance | Rejected],
    out: str | os.PathLike[str],
    *,
    name: str,
    fingerprint: str | None = None,
    tokenizer: text_lib.CharTokenizer | None = None,
    feature_config: LogMelConfig | None = None,
    language: str = "en",
    pad_space: bool = True,
    dev_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    stride: int = 3,
    min_frames: int = 7,
    max_seconds: float = 30.0,
    total: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Computes features and labels of utterances and writes them as a corpus on disk.

    Every input is either stored or counted under one reason (and listed in `skipped.jsonl`):
    whatever reason its source gave (`Rejected`), "bad_split" (not a name a split can have),
    "duplicate_id", "empty_text" (nothing left after normalisation), "unknown_characters" (the
    transcript holds characters, such as digits, that the alphabet cannot write; leaving them out
    would change what was said), "unreadable_audio" (decoding failed, or no samples),
    "non_finite_audio" (NaN or Inf), "too_long", "too_short" and "infeasible" (more labels than
    CTC can align with the model's output frames).

    The corpus holds, per utterance, "features" float16 [frames, mels] and "labels" int32
    [characters]; a user's utterances are ordered by id, so the order of the input does not matter.
    Users none of whose utterances names a split are divided among train, dev and test, whole users
    at a time, by a hash of the seed and the user. Other utterances without a split join the first
    split that their user names.

    A finished corpus with the same fingerprint is left as it is; an interrupted preparation is
    started afresh. Processes preparing the same folder wait for one another.

    Args:
      utterances: the input, read once. `audio()` may raise anything: the utterance is skipped,
        except for UserError (such as a missing package), which stops the preparation.
      out: folder to write; absent, empty, or holding a corpus.
      name: of the corpus, for people.
      fingerprint: identifies the source and its contents; together with the options here it
        decides whether a finished corpus can be used again. None: never.
      tokenizer: writes labels; the default alphabet if None.
      feature_config: parameters of the features; the paper's if None.
      language: for `normalize_text`.
      pad_space: put a space on both sides of the labels, as in the paper's targets.
      dev_fraction: share of the undivided users held out for dev, at least one user of three.
      test_fraction: the same for test. 0 holds none out.
      seed: of the division.
      stride: input frames per output frame of the model (outputs = ceil(frames / stride)).
      min_frames: fewest frames that the model's front end takes.
      max_seconds: longest audio stored.
      total: number of inputs if known, for `progress`.
      progress: called with (inputs done, total) after each input.
      overwrite: replace a finished corpus that differs.

    Returns:
      {"users", "utterances", "hours", "skipped": {reason: count}, "users_without_utterances",
      "users_in_several_splits", "splits": {split: {"users", "utterances", "hours"}}}.

    Raises:
      UserError: the folder holds something else, an option makes no sense, or no utterance at all
        could be stored.
    """
    from fedasr.audio import features as features_lib

    feature_config = feature_config or features_lib.LogMelConfig()
    tokenizer = tokenizer or text_lib.CharTokenizer()
    if min(dev_fraction, test_fraction) < 0 or dev_fraction + test_fraction >= 1:
        raise UserError(
            f"dev_fraction={dev_fraction} and test_fraction={test_fraction} must be at least 0 "
            "and sum to less than 1"
        )
    if stride < 1 or min_frames < 1 or not max_seconds > 0:
        raise UserError("stride, min_frames and max_seconds must be positive")
    options = {
        "characters": text_lib.CHARACTERS,
        "features": dataclasses.asdict(feature_config),
        "language": language,
        "pad_space": pad_space,
        "dev_fraction": dev_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
        "stride": stride,
        "min_frames": min_frames,
        "max_seconds": max_seconds,
    }
    identity = None
    if fingerprint is not None:
        identity = _digest([_PREPARE_VERSION, corpus_lib.FORMAT_VERSION, fingerprint, options])

    def convert(utterance: Utterance) -> tuple[np.ndarray, np.ndarray, float]:
        """(features float16 [frames, mels], labels int32 [characters], seconds), or _Skip."""
        normalised, unknown = text_lib.normalize_text(utterance.text, language)
        if unknown:
            raise _Skip("unknown_characters", f"{unknown} in {utterance.text!r}")
        if not normalised:
            raise _Skip("empty_text", repr(utterance.text))
        labels = np.asarray(tokenizer.encode(normalised, pad_space=pad_space), np.int32)
        try:
            audio, rate = utterance.audio()
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise _Skip("unreadable_audio", f"{type(error).__name__}: {error}") from error
        audio = np.asarray(audio)
        if not rate > 0:
            raise _Skip("unreadable_audio", f"a sample rate of {rate}")
        if not audio.size:
            raise _Skip("unreadable_audio", "no samples")
        seconds = len(audio) / rate
        if seconds > max_seconds:
            raise _Skip("too_long", f"{seconds:.2f} s, at most {max_seconds} s")
        if not np.isfinite(audio).all():
            raise _Skip("non_finite_audio", "NaN or Inf samples")
        waveform = features_lib.to_mono_16k(audio, rate, feature_config)
        frames = features_lib.num_frames(len(waveform), feature_config)
        if frames < min_frames:
            raise _Skip("too_short", f"{frames} frames, at least {min_frames}")
        needed = len(labels) + int(np.count_nonzero(labels[1:] == labels[:-1]))
        if needed > -(-frames // stride):
            raise _Skip(
                "infeasible", f"{needed} output frames needed, {-(-frames // stride)} there"
            )
        features = np.asarray(features_lib.extract(waveform, feature_config))
        if not np.isfinite(features).all():  # finite samples, but absurdly large ones
            raise _Skip("non_finite_audio", "the features overflow")
        return features.astype(np.float16), labels, seconds

    out = Path(out)
    with _prepared_folder(out, identity, overwrite) as finished:
        if finished is not None:
            return finished["summary"]
        scratch = out / _UNFINISHED
        with open(scratch / "spool", "w+b") as spool_file:
            spool = _Spool(spool_file, feature_config.num_mels)
            with open(out / SKIPPED_FILE, "w", encoding="utf-8") as skipped_file:
                skipped = _store(utterances, convert, spool, skipped_file, total, progress)
            if not spool.rows:
                counts = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "no input"
                raise UserError(f"no utterance could be stored ({counts}): mend the source")
            splits, several = _divide(spool, dev_fraction, test_fraction, seed)
            summary = _summary(splits, spool, skipped, several)
            corpus_lib.write_corpus(
                out,
                splits,
                {"name": name, "identity": identity, "options": options, "summary": summary},
            )
    return summary


def cache_dir() -> Path:
    """Where data made on this machine is kept: $FEDASR_CACHE, or ~/.cache/fedasr."""
    return Path(os.environ.get("FEDASR_CACHE") or Path.home() / ".cache" / "fedasr")


def prepare_synthetic(
    config: SyntheticConfig,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Makes the synthetic corpus of `config` unless it is already there.

    Args:
      config: of `fedasr.data.synthetic`.
      out: folder to write; a folder of the cache, named by the configuration, if None.
      progress: called with (utterances done, all); a progress bar on stderr if None.
      overwrite: as in `prepare`.

    Returns:
      The folder of the corpus.

    Raises:
      UserError: the speech synthesiser is missing, or as `prepare`.
    """
    from fedasr.data import synthetic

    fingerprint = synthetic.fingerprint(config)
    cached = out is None  # what the cache holds may come from an older version
    if out is None:
        out = cache_dir() / f"synthetic-{config.task}-{fingerprint[:16]}"
    with progress_bar("preparing speech") if progress is None else _as_is(progress) as report:
        prepare(
            synthetic.synthetic_utterances(config),
            out,
            name=f"synthetic {config.task}",
            fingerprint=fingerprint,
            total=synthetic.total_utterances(config),
            progress=report,
            overwrite=overwrite or cached,
        )
    return Path(out)


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A progress bar on stderr that appears with the first report; nothing without rich."""
    try:
        from rich import console, progress
    except ImportError:
        yield lambda done, total: None
        return
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console.Console(file=sys.stderr),
    )
    task = None

    def report(done: int, total: int | None) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(description, total=total)
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        if task is not None:
            bar.stop()


@contextlib.contextmanager
def _as_is(progress: Progress) -> Iterator[Progress]:
    yield progress


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _prepared_folder(
    out: Path, identity: str | None, overwrite: bool
) -> Iterator[dict[str, Any] | None]:
    """Locks `out`; gives the metadata of a corpus that can be used, else None and a clean folder.

    A folder is ours where it holds `corpus.json` or the mark of an unfinished preparation, which
    stands from before the first file is written until after `corpus.json` is.
    """
    mark, metadata_path = out / _UNFINISHED, out / corpus_lib.METADATA_FILE
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another")
    foreign = sorted(p.name for p in out.iterdir() if p.name != _LOCK) if out.exists() else []
    # In this order, so that another process that is just finishing is not mistaken.
    if foreign and not mark.exists() and not metadata_path.exists():
        raise UserError(f"{out} holds other files ({foreign[0]!r}): choose an empty or new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / _LOCK, "w")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another") from error
    with lock:
        _lock(lock, out)
        if metadata_path.exists():
            finished = _usable(out, identity, overwrite)
            if finished is not None:
                shutil.rmtree(mark, ignore_errors=True)
                yield finished
                return
        mark.mkdir(exist_ok=True)
        # corpus.json goes first: from here on nobody takes the folder for a corpus.
        metadata_path.unlink(missing_ok=True)
        for path in out.iterdir():
            if path.name not in (_LOCK, _UNFINISHED):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield None
        finally:
            if metadata_path.exists():
                shutil.rmtree(mark)
            else:  # keep the mark, but not the disk space
                (mark / "spool").unlink(missing_ok=True)


def _usable(out: Path, identity: str | None, overwrite: bool) -> dict[str, Any] | None:
    """The metadata of the finished corpus in `out` if it is the one asked for and whole."""
    try:
        metadata = corpus_lib.read_metadata(out)
        same = identity is not None and metadata.get("identity") == identity
    except UserError:
        if overwrite:
            return None
        raise
    if same:
        try:
            for split in metadata["splits"]:
                corpus_lib.open_corpus(out, split)
        except UserError as error:
            logging.getLogger(__name__).warning("preparing again: %s", error)
            return None
        return metadata
    if not overwrite:
        raise UserError(
            f"{out} holds another corpus ({metadata.get('name')!r}, from other data or options): "
            "choose another folder, or set overwrite to replace it"
        )
    return None


def _lock(file: IO[str], out: Path) -> None:
    """Waits until no other process prepares `out`; the system frees the lock of a dead process."""
    try:
        import fcntl
    except ImportError:  # not on Windows: preparing one folder twice at a time is not safe there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logging.getLogger(__name__).warning("waiting for another process that prepares %s", out)
        fcntl.flock(file, fcntl.LOCK_EX)


def _store(
    utterances: Iterable[Utterance | Rejected],
    convert: Callable[[Utterance], tuple[np.ndarray, np.ndarray, float]],
    spool: _Spool,
    skipped_file: IO[str],
    total: int | None,
    progress: Progress | None,
) -> dict[str, int]:
    """Puts each input into the spool or counts it; returns the counts by reason, sorted."""
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    for done, item in enumerate(utterances, start=1):
        try:
            if isinstance(item, Rejected):
                raise _Skip(item.reason, item.detail)
            spool.seen_users.add(item.user)
            if item.split is not None and not corpus_lib.valid_split_name(item.split):
                raise _Skip("bad_split", repr(item.split))
            if item.id in seen:
                raise _Skip("duplicate_id", "")
            converted = convert(item)
            seen.add(item.id)  # only now: an id that failed before may still come with good audio
            spool.add(item, *converted)
        except _Skip as skip:
            reason, detail = skip.args
            skipped[reason] += 1
            line = {"id": item.id, "reason": reason, "detail": " ".join(detail.split())[:300]}
            skipped_file.write(json.dumps(line) + "\n")
        if progress is not None:
            progress(done, total)
    return dict(sorted(skipped.items()))


@dataclass(frozen=True)
class _Row:
    """Where one utterance lies in the spool."""

    id: str
    user: str
    split: str | None
    offset: int
    frames: int
    characters: int
    seconds: float


class _Spool:
    """Utterances on disk in order of arrival, so that memory stays small."""

    def __init__(self, file: IO[bytes], mels: int) -> None:
        self._file, self._mels = file, mels
        self.rows: list[_Row] = []
        self.seen_users: set[str] = set()

    def add(
        self, item: Utterance, features: np.ndarray, labels: np.ndarray, seconds: float
    ) -> None:
        offset = self._file.tell()
        self._file.write(features.tobytes())
        self._file.write(labels.tobytes())
        self.rows.append(
            _Row(item.id, item.user, item.split, offset, len(features), len(labels), seconds)
        )

    def read(self, row: _Row) -> dict[str, np.ndarray]:
        self._file.seek(row.offset)
        features = np.frombuffer(self._file.read(2 * row.frames * self._mels), np.float16)
        labels = np.frombuffer(self._file.read(4 * row.characters), np.int32)
        return {"features": features.reshape(row.frames, self._mels), "labels": labels}


class _SpoolCorpus:
    """One split of a spool as a `Corpus`."""

    def __init__(self, spool: _Spool, by_user: Mapping[str, Sequence[_Row]]) -> None:
        self._spool = spool
        self.users = tuple(sorted(by_user))
        self.rows = [sorted(by_user[user], key=lambda row: row.id) for user in self.users]
        self.sizes = np.asarray([len(rows) for rows in self.rows], np.int64)

    def lengths(self, user: int) -> dict[str, np.ndarray]:
        rows = self.rows[user]
        return {
            "features": np.asarray([row.frames for row in rows], np.int32),
            "labels": np.asarray([row.characters for row in rows], np.int32),
        }

    def get(self, user: int, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self._spool.read(self.rows[user][i]) for i in indices]


def _divide(
    spool: _Spool, dev_fraction: float, test_fraction: float, seed: int
) -> tuple[dict[str, _SpoolCorpus], int]:
    """Splits by name, train first, and the number of users who are in several of them."""
    named: dict[str, list[str]] = {}
    undivided: set[str] = set()
    for row in spool.rows:
        if row.split is None:
            undivided.add(row.user)
        elif row.split not in named.setdefault(row.user, []):
            named[row.user].append(row.split)
    undivided -= set(named)
    default = {user: splits[0] for user, splits in named.items()}
    default |= held_out(undivided, dev_fraction, test_fraction, seed)

    by_split: dict[str, dict[str, list[_Row]]] = {}
    for row in spool.rows:
        split = default[row.user] if row.split is None else row.split
        by_split.setdefault(split, {}).setdefault(row.user, []).append(row)
    order = sorted(by_split, key=lambda split: (split != "train", split))
    several = sum(len(splits) > 1 for splits in named.values())
    return {split: _SpoolCorpus(spool, by_split[split]) for split in order}, several


def held_out(
    users: Iterable[str], dev_fraction: float, test_fraction: float, seed: int = 0
) -> dict[str, str]:
    """The split of each user: "train", "dev" or "test".

    Users are ordered by a hash of (seed, user); the first round(fraction * users) of them, but at
    least one for each fraction above 0, are test and dev. Fewer than three users are all "train".
    """
    order = sorted(users, key=lambda user: _digest([seed, user]))
    counts = [
        max(1, round(fraction * len(order))) if fraction > 0 and len(order) >= 3 else 0
        for fraction in (test_fraction, dev_fraction)
    ]
    while sum(counts) >= max(len(order), 1):  # someone must be left to train
        counts[counts.index(max(counts))] -= 1
    test, dev = counts[0], sum(counts)
    return {
        user: "test" if i < test else "dev" if i < dev else "train" for i, user in enumerate(order)
    }


def _summary(
    splits: Mapping[str, _SpoolCorpus],
    spool: _Spool,
    skipped: Mapping[str, int],
    several: int,
) -> dict[str, Any]:
    stored = {row.user for row in spool.rows}
    return {
        "users": len(stored),
        "utterances": len(spool.rows),
        "hours": _hours(spool.rows),
        "skipped": dict(skipped),
        "users_without_utterances": len(spool.seen_users - stored),
        "users_in_several_splits": several,
        "splits": {
            name: {
                "users": len(corpus.users),
                "utterances": int(corpus.sizes.sum()),
                "hours": _hours([row for rows in corpus.rows for row in rows]),
            }
            for name, corpus in splits.items()
        },
    }


def _hours(rows: Iterable[_Row]) -> float:
    return round(sum(row.seconds for row in rows) / 3600, 6)
