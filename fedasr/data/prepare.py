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
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fedasr import text as text_lib
from fedasr.data import conversion
from fedasr.data import corpus as corpus_lib
from fedasr.data import identity as identity_lib
from fedasr.data.conversion import Conversion, Progress, Rejected, Row, Skipped, Utterance
from fedasr.data.corpus import Example
from fedasr.errors import UserError

if TYPE_CHECKING:  # numpy only at run time: features come from JAX, loaded when they are computed
    from fedasr.audio.features import LogMelConfig
    from fedasr.data.synthetic import SyntheticConfig

SKIPPED_FILE = "skipped.jsonl"
UTTERANCES_FILE = "utterances.jsonl"
_UNFINISHED = ".unfinished"
_PARTS = "parts"  # in the folder of what is unfinished
_LOCK = ".lock"
_PREPARE_VERSION = 3  # part of the fingerprint: raise it when the same input gives other data


def prepare(
    utterances: Iterable[Utterance | Rejected],
    out: str | os.PathLike[str],
    *,
    name: str,
    fingerprint: str | None = None,
    feature_config: LogMelConfig | None = None,
    language: str = "en",
    keep_letters: bool = False,
    alphabet: str = "",
    learned: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    store: str = "features",
    pad_space: bool = True,
    dev_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    stride: int = 3,
    min_frames: int = 7,
    max_seconds: float = 30.0,
    workers: int = 1,
    notes: Mapping[str, int] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Computes features and labels of utterances and writes them as a corpus on disk.

    Every input is either stored or counted under one reason (and listed in `skipped.jsonl`):
    whatever reason its source gave (`Rejected`), "bad_split" (not a name a split can have),
    "bad_user" (an empty id), "duplicate_id", "duplicate_recording" (the same part of the same file
    with the same transcript, whatever its names and users), "duration_mismatch" (another length
    than is stated, by more than 0.1 s), "empty_text" (nothing left after normalisation),
    "unknown_characters" (the transcript holds characters, such as digits, that the alphabet cannot
    write; leaving them out would change what was said), "unwritable_text" (a subword tokenizer
    gives another text back), "unreadable_audio" (decoding failed, the file is cut or damaged, or
    there are no samples),
    "non_finite_audio" (NaN or Inf), "too_long", "too_short" and "infeasible" (more labels than
    CTC can align with the model's output frames).

    The corpus gives, per utterance, "features" float16 [frames, mels] and "labels" int32
    [characters]; a user's utterances are ordered by id, so the order of the input does not matter.
    With `store="audio"` it holds "audio" int16 [samples] at 16 kHz, twice the space of 80 mels;
    `open_corpus` then computes the features when they are read. They are the same up to the
    rounding of samples to int16, which 16-bit recordings at 16 kHz do not need.
    Users none of whose utterances names a split are divided among train, dev and test, whole users
    at a time, by a hash of the seed and the user. Other utterances without a split join the first
    split that their user names. Users' ids are stored in one spelling
    (`fedasr.data.identity.normalised_user`).

    Beside the corpus, `utterances.jsonl` lists what is stored in its order, with the metadata that
    the source carries through.

    A finished corpus with the same fingerprint is left as it is; a preparation that was interrupted
    goes on with what it had converted when it is asked for again with the same fingerprint.
    The corpus is the same, byte for byte, for any number of workers and of interruptions. Processes
    preparing the same folder wait for one another. While it works, the folder takes twice the disk
    space of the corpus.

    Args:
      utterances: the input, read once. `audio()` may raise anything: the utterance is skipped,
        except for UserError (such as a missing package), which stops the preparation.
      out: folder to write; absent, empty, or holding a corpus.
      name: of the corpus, for people.
      fingerprint: identifies the source and its contents; together with the options here it
        decides whether a finished corpus, or parts of one, can be used again. None: never.
      feature_config: parameters of the features; the paper's if None.
      language: of the transcripts, one of `fedasr.text.LANGUAGES`.
      keep_letters: write the language's own letters (é, ä, ß) instead of folding them to a-z.
      alphabet: the characters of the labels, or one of `fedasr.text.SCRIPTS`; "" for the
        language's. `fedasr.text.alphabet_of` finds those of a source.
      learned: whether that alphabet was found in the transcripts: runs then say that it is not
        covered by their privacy.
      tokenizer: a SentencePiece model or a `tokenizer.json`, in place of an alphabet.
      store: "features" or "audio".
      pad_space: put a space on both sides of the labels, as in the paper's targets.
      dev_fraction: share of the undivided users held out for dev, at least one user of three.
      test_fraction: the same for test. 0 holds none out.
      seed: of the division.
      stride: input frames per output frame of the model (outputs = ceil(frames / stride)).
      min_frames: fewest frames that the model's front end takes.
      max_seconds: longest audio stored, except in splits that are named dev... or test...
      workers: processes that convert, 0 for one a core; more than 1 need picklable utterances.
      notes: counts that the source wants in the summary.
      total: number of inputs if known, for `progress`.
      progress: called with (inputs done, total), after each input where there is one worker.
      overwrite: replace a finished corpus that differs.
      source: how to open the source again, for whoever verifies the corpus; stored as it is.

    Returns:
      {"users", "utterances", "hours", "minutes_per_user", "skipped": {reason: count},
      "skipped_examples": {reason: "id: detail" of the first},
      "unknown_characters": the most frequent of them, as [shown, reason, count],
      "users_without_utterances", "users_in_several_splits", "notes", "splits": {split: {"users",
      "utterances", "hours", "minutes_per_user"}}}. "minutes_per_user" is {"mean", "std" (of the
      population), "min", "max"}; "notes" are those given and, where they are not 0, with
      `store="audio"` "saturated_utterances" (how many had samples beyond [-1, 1], which int16
      cannot hold), "utterances_with_decoder_complaints", "decoder_complaints" (lines),
      "recordings_stored_several_times" (equal sound from different files),
      "recordings_in_several_splits" (the test set is then no test), "recordings_of_several_users",
      "recordings_with_several_transcripts", "user_ids_normalised" (spellings that are stored as
      another) and "users_differing_by_case_only".

    Raises:
      UserError: the folder holds something else, an option makes no sense, no utterance at all
        could be stored, or one of the processes died.
    """
    from fedasr.audio import features as features_lib

    if min(dev_fraction, test_fraction) < 0 or dev_fraction + test_fraction >= 1:
        raise UserError(
            f"dev_fraction={dev_fraction} and test_fraction={test_fraction} must be at least 0 "
            "and sum to less than 1"
        )
    if stride < 1 or min_frames < 1 or not max_seconds > 0:
        raise UserError("stride, min_frames and max_seconds must be positive")
    if store not in conversion.STORES:
        raise UserError(f"store={store!r}: use one of {conversion.STORES}")
    if workers < 0:
        raise UserError(f"workers must be 0 (one a core) or more, not {workers}")
    if tokenizer is not None and (alphabet or keep_letters):
        raise UserError("a tokenizer has its own characters: leave the alphabet and letters out")
    if alphabet == text_lib.FROM_DATA:
        raise UserError("utterances are read once: find their alphabet by fedasr.text.alphabet_of")
    if alphabet in text_lib.SCRIPTS:
        alphabet = text_lib.script_alphabet(alphabet)
    elif alphabet.isascii() and len(set(alphabet)) < len(alphabet):
        text_lib.script_alphabet(alphabet)  # a name, which is unknown
    converter = conversion.Converter(
        alphabet=alphabet,
        subwords=None if tokenizer is None else text_lib.read_subwords(tokenizer).options,
        learned=learned,
        features=feature_config or features_lib.LogMelConfig(),
        language=language,
        keep_letters=keep_letters,
        store=store,
        pad_space=pad_space,
        stride=stride,
        min_frames=min_frames,
        max_seconds=max_seconds,
    )
    return prepare_with(
        converter,
        utterances,
        out,
        name=name,
        fingerprint=fingerprint,
        dev_fraction=dev_fraction,
        test_fraction=test_fraction,
        seed=seed,
        workers=workers,
        notes=notes,
        total=total,
        progress=progress,
        overwrite=overwrite,
        source=source,
    )


def prepare_with(
    converter: Conversion,
    utterances: Iterable[Utterance | Rejected],
    out: str | os.PathLike[str],
    *,
    name: str,
    fingerprint: str | None = None,
    dev_fraction: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    workers: int = 1,
    notes: Mapping[str, int] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    write_more: Callable[[Path], None] | None = None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`prepare` with any converter, such as `fedasr.data.neural.NeuralConverter`.

    Args:
      converter: a picklable data class with the attributes and the call of
        `fedasr.data.conversion.Converter`; its fields are stored as the corpus's options.
      notes: read when all utterances are converted.
      write_more: called with the folder when all utterances are converted, before the corpus counts
        as done: for files that belong to it.
      utterances, out and the rest: see `prepare`.

    Returns and raises: see `prepare`.
    """
    options = {
        **dataclasses.asdict(converter),
        "characters": converter.characters,
        "dev_fraction": dev_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
    }
    identity = None
    if fingerprint is not None:
        identity = _digest([_PREPARE_VERSION, corpus_lib.FORMAT_VERSION, fingerprint, options])

    out = Path(out)
    with _prepared_folder(out, identity, overwrite) as finished:
        if finished is not None:
            return finished["summary"]
        parts = out / _UNFINISHED / _PARTS
        count = conversion.convert_all(
            utterances, converter, parts, workers or _cores(), total, progress
        )
        with open(out / SKIPPED_FILE, "w", encoding="utf-8") as skipped_file:
            inputs = _accepted(conversion.read_rows(parts, count), skipped_file)
        rows, users, skipped = inputs.rows, inputs.users, inputs.skipped
        if not rows:
            raise UserError(_nothing_stored(inputs, out))
        by_split, several = _divide(rows, dev_fraction, test_fraction, seed)
        splits = {
            split: _ConvertedCorpus(by_user, parts, converter)
            for split, by_user in by_split.items()
        }
        if write_more is not None:
            write_more(out)
        notes = {**(notes or {}), **_notes(inputs, by_split)}
        _write_utterances(out / UTTERANCES_FILE, splits)
        summary = {
            **_extent(rows),
            "skipped": skipped,
            "skipped_examples": inputs.examples,
            "unknown_characters": _unknown(out / SKIPPED_FILE),
            "users_without_utterances": len(users - {row.user for row in rows}),
            "users_in_several_splits": several,
            "notes": notes,
            "splits": {
                split: _extent(row for by_user in corpus.rows for row in by_user)
                for split, corpus in splits.items()
            },
        }
        corpus_lib.write_corpus(
            out,
            splits,
            {
                **{"name": name, "identity": identity, "options": options, "summary": summary},
                **({"source": dict(source)} if source else {}),
            },
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
    store: str = "features",
) -> Path:
    """Makes the synthetic corpus of `config` unless it is already there.

    Args:
      config: of `fedasr.data.synthetic`.
      out: folder to write; a folder of the cache, named by the configuration, if None.
      progress: called with (utterances done, all); a progress bar on stderr if None.
      overwrite: as in `prepare`.
      store: as in `prepare`.

    Returns:
      The folder of the corpus.

    Raises:
      UserError: the speech synthesiser is missing, or as `prepare`.
    """
    from fedasr.data import synthetic

    fingerprint = synthetic.fingerprint(config)
    cached = out is None  # what the cache holds may come from an older version
    if out is None:
        kind = "" if store == "features" else f"-{store}"
        out = cache_dir() / f"synthetic-{config.task}-{fingerprint[:16]}{kind}"
    with progress_bar("preparing speech") if progress is None else _as_is(progress) as report:
        prepare(
            synthetic.synthetic_utterances(config),
            out,
            name=f"synthetic {config.task}",
            fingerprint=fingerprint,
            total=synthetic.total_utterances(config),
            progress=report,
            overwrite=overwrite or cached,
            store=store,
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
        # A thread that draws imports at its own times: the lazy imports of other packages break it.
        auto_refresh=False,
    )
    task, drawn = None, 0.0

    def report(done: int, total: int | None) -> None:
        nonlocal task, drawn
        if task is None:
            bar.start()
            task = bar.add_task(description, total=total)
        bar.update(task, completed=done, total=total)
        if done == total or time.monotonic() - drawn > 0.2:
            bar.refresh()
            drawn = time.monotonic()

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
        _keep_parts(mark, identity)
        try:
            yield None
        finally:
            if metadata_path.exists():
                shutil.rmtree(mark)
            elif identity is None:  # keep the mark, but not the disk space
                shutil.rmtree(mark / _PARTS, ignore_errors=True)


def _keep_parts(mark: Path, identity: str | None) -> None:
    """Removes parts that another preparation left, unless it was of the same input and options."""
    path = mark / "identity"
    if identity is None or not path.is_file() or path.read_text() != identity:
        shutil.rmtree(mark / _PARTS, ignore_errors=True)
        path.write_text(identity or "")


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


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclasses.dataclass
class _Inputs:
    """What became of all inputs.

    Attributes:
      rows: those that are stored. users: all that the input names. skipped: counts by reason,
      sorted. examples: one "id: detail" for each reason. again: (recording, named split, user) of
      those skipped because their file and transcript are stored already. renamed: users' ids that
      were not as they are stored.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    users: set[str] = dataclasses.field(default_factory=set)
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    again: list[tuple[str, str | None, str]] = dataclasses.field(default_factory=list)
    renamed: set[str] = dataclasses.field(default_factory=set)


def _accepted(items: Iterable[Row | Skipped], skipped_file: IO[str]) -> _Inputs:
    """Takes in what became of each input, and lists what is left out."""
    inputs = _Inputs()
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    stored: dict[str, Row] = {}  # by file and transcript
    for item in items:
        if item.user is not None:
            inputs.users.add(item.user)
            if spelling := getattr(item, "spelling", None):
                inputs.renamed.add(spelling)
            # Only an id that was stored is taken: one that failed may still come with good audio.
            if item.id in seen and getattr(item, "reason", None) != "bad_split":
                item = Skipped(item.id, item.user, "duplicate_id", "")
        if isinstance(item, Row) and item.file is not None:
            first = stored.setdefault(item.file, item)
            if first is not item:
                inputs.again.append((first.recording or "", item.split, item.user))
                same = f"the same file and transcript as {first.id!r} of {first.user!r}"
                item = Skipped(item.id, item.user, "duplicate_recording", same)
        if isinstance(item, Row):
            seen.add(item.id)
            inputs.rows.append(item)
            continue
        skipped[item.reason] += 1
        inputs.examples.setdefault(item.reason, f"{item.id}: {item.detail}".rstrip(": "))
        line = {"id": item.id, "reason": item.reason, "detail": item.detail}
        skipped_file.write(json.dumps(line) + "\n")
    inputs.skipped = dict(sorted(skipped.items()))
    inputs.examples = dict(sorted(inputs.examples.items()))
    return inputs


def _nothing_stored(inputs: _Inputs, out: Path) -> str:
    """One line that says why, with an example and where the rest is."""
    if not inputs.skipped:
        return "no utterance could be stored (no input): mend the source"
    counts = ", ".join(f"{n} {reason}" for reason, n in inputs.skipped.items())
    if "unknown_characters" in inputs.skipped:
        counts += f": {describe_unknown(_unknown(out / SKIPPED_FILE))}"
    most = max(inputs.skipped, key=inputs.skipped.__getitem__)
    return (
        f"no utterance could be stored ({counts}); for example {inputs.examples[most]} "
        f"(all are listed in {out / SKIPPED_FILE}): mend the source"
    )


def _notes(inputs: _Inputs, by_split: Mapping[str, Mapping[str, Sequence[Row]]]) -> dict[str, int]:
    """Counts of what is stored but worth a look; those that are 0 are left out."""
    places: dict[str, set[str]] = {}
    speakers: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    copies: Counter[str] = Counter()
    for split, by_user in by_split.items():
        for row in (row for rows in by_user.values() for row in rows):
            if row.recording is not None:
                places.setdefault(row.recording, set()).add(split)
                speakers.setdefault(row.recording, set()).add(row.user)
                texts.setdefault(row.recording, set()).add(row.transcript)
                copies[row.recording] += 1
    for recording, named, user in inputs.again:
        speakers[recording].add(user)
        if named is not None:
            places[recording].add(named)
    users = {row.user for row in inputs.rows}
    counts = {
        "saturated_utterances": sum(row.saturated for row in inputs.rows),
        "utterances_with_decoder_complaints": sum(row.complaints > 0 for row in inputs.rows),
        "decoder_complaints": sum(row.complaints for row in inputs.rows),
        "recordings_stored_several_times": sum(count > 1 for count in copies.values()),
        "recordings_in_several_splits": sum(len(x) > 1 for x in places.values()),
        "recordings_of_several_users": sum(len(x) > 1 for x in speakers.values()),
        "recordings_with_several_transcripts": sum(len(x) > 1 for x in texts.values()),
        "user_ids_normalised": len(inputs.renamed),
        "users_differing_by_case_only": identity_lib.case_variants(users),
    }
    return {name: count for name, count in counts.items() if count}


def _write_utterances(path: Path, splits: Mapping[str, _ConvertedCorpus]) -> None:
    """Lists what is stored, in its order: the split, the user, the id, and what else is known."""
    with open(path, "w", encoding="utf-8") as file:
        for split, corpus in splits.items():
            for user, rows in zip(corpus.users, corpus.rows, strict=True):
                for row in rows:
                    line: dict[str, Any] = {"split": split, "user": user, "id": row.id}
                    line["seconds"] = round(row.seconds, 4)
                    if row.metadata:
                        line["metadata"] = dict(row.metadata)
                    file.write(json.dumps(line) + "\n")


_SHOWN = 20  # kinds of unknown characters in a summary


def _unknown(path: Path) -> list[list[Any]]:
    """What made transcripts unusable, most frequent first: [characters, reason, count]."""
    counts: Counter[tuple[str, str]] = Counter()
    with open(path, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["reason"] == "unknown_characters":
                counts += text_lib.parse_losses(line["detail"])
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[shown, reason, count] for (shown, reason), count in ordered[:_SHOWN]]


def describe_unknown(unknown: Sequence[Sequence[Any]]) -> str:
    """One line: which characters, how often, and for each kind what keeps them."""
    shown = ", ".join(f"{characters} {count}x" for characters, _, count in unknown[:10])
    reasons = dict.fromkeys(reason for _, reason, _ in unknown)
    return f"{shown} ({'; '.join(f'{r}: {text_lib.REASONS[r]}' for r in reasons)})"


class _ConvertedCorpus:
    """One split of what was converted, as a `Corpus`."""

    def __init__(
        self, by_user: Mapping[str, Sequence[Row]], parts: Path, converter: Conversion
    ) -> None:
        self._parts, self._converter = parts, converter
        self.users = tuple(sorted(by_user))
        self.rows = [sorted(by_user[user], key=lambda row: row.id) for user in self.users]
        self.sizes = np.asarray([len(rows) for rows in self.rows], np.int64)

    def lengths(self, user: int) -> dict[str, np.ndarray]:
        rows = self.rows[user]
        return {
            self._converter.store: np.asarray([row.length for row in rows], np.int32),
            "labels": np.asarray([row.characters for row in rows], np.int32),
        }

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        read = [
            conversion.read_signal(self._parts, self.rows[user][i], self._converter)
            for i in indices
        ]
        return [{self._converter.store: signal, "labels": labels} for signal, labels in read]


def _divide(
    rows: Iterable[Row], dev_fraction: float, test_fraction: float, seed: int
) -> tuple[dict[str, dict[str, list[Row]]], int]:
    """Rows by split (train first) and user, and how many users are in several splits."""
    rows = list(rows)
    named: dict[str, list[str]] = {}
    undivided: set[str] = set()
    for row in rows:
        if row.split is None:
            undivided.add(row.user)
        elif row.split not in named.setdefault(row.user, []):
            named[row.user].append(row.split)
    undivided -= set(named)
    default = {user: splits[0] for user, splits in named.items()}
    default |= held_out(undivided, dev_fraction, test_fraction, seed)

    by_split: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        split = default[row.user] if row.split is None else row.split
        by_split.setdefault(split, {}).setdefault(row.user, []).append(row)
    order = sorted(by_split, key=lambda split: (split != "train", split))
    several = sum(len(splits) > 1 for splits in named.values())
    return {split: by_split[split] for split in order}, several


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


def _extent(rows: Iterable[Row]) -> dict[str, Any]:
    """Users, utterances, hours, and minutes per user of some rows."""
    seconds: dict[str, float] = {}
    utterances = 0
    for row in rows:
        seconds[row.user] = seconds.get(row.user, 0.0) + row.seconds
        utterances += 1
    minutes = np.asarray(list(seconds.values())) / 60
    statistics: dict[str, Callable[[np.ndarray], Any]]
    statistics = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    return {
        "users": len(seconds),
        "utterances": utterances,
        "hours": round(float(minutes.sum()) / 60, 6),
        "minutes_per_user": {name: round(float(of(minutes)), 4) for name, of in statistics.items()},
    }
