"""Turns utterances into a corpus of features on disk, once, counting whatever is left out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedasr import text as text_lib
from fedasr.data import records, writing
from fedasr.data.corpus import Example
from fedasr.data.listing import UTTERANCES_FILE
from fedasr.data.preparation import parts as parts_lib
from fedasr.data.preparation.conversion import RULES, STORES, Conversion, Converter
from fedasr.data.preparation.division import divide, json_digest
from fedasr.data.preparation.folder import PARTS, UNFINISHED, prepared_folder
from fedasr.data.preparation.parts import Row
from fedasr.data.preparation.summary import (
    SKIPPED_FILE,
    accepted,
    extent,
    nothing_stored,
    unknown_characters,
    worth_a_look,
)
from fedasr.data.utterances import Progress, Rejected, Utterance
from fedasr.errors import UserError

if TYPE_CHECKING:  # numpy only at run time: features come from JAX, loaded when they are computed
    from fedasr.audio.features import LogMelConfig

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
    rules: str = "",
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
      rules: "published" for transcripts as the programs of arXiv 2310.00098 write them
        (`fedasr.text.published_text`): what cannot be written is left out of a label, and the
        utterance stays.
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

    _check_shares(dev_fraction, test_fraction)
    if stride < 1 or min_frames < 1 or not max_seconds > 0:
        raise UserError("stride, min_frames and max_seconds must be positive")
    if store not in STORES:
        raise UserError(f"store={store!r}: use one of {STORES}")
    if workers < 0:
        raise UserError(f"workers must be 0 (one a core) or more, not {workers}")
    _check_labels(bool(alphabet or keep_letters), tokenizer is not None, rules)
    converter = Converter(
        alphabet=_characters(alphabet),
        subwords=None if tokenizer is None else text_lib.read_subwords(tokenizer).options,
        learned=learned,
        rules=rules,
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


# Options that releases added, with what older ones did: what holds that is left out of what a
# corpus is known by, so that a preparation goes on in a folder of theirs.
_LATER: dict[str, Any] = {"rules": "", "labels": "", "g2p": False, "final_silence": False}


def _check_labels(letters: bool, tokenizer: bool, rules: str) -> None:
    """Raises UserError where more than one option says which characters labels have."""
    if tokenizer and letters:
        raise UserError("a tokenizer has its own characters: leave the alphabet and letters out")
    if rules not in RULES:
        raise UserError(f"rules={rules!r}: use one of {RULES}")
    if rules and (letters or tokenizer):
        raise UserError(
            "the published rules write a-z, space, apostrophe and hyphen: leave alphabet, letters "
            "and tokenizer out"
        )


def _check_shares(dev_fraction: float, test_fraction: float) -> None:
    if min(dev_fraction, test_fraction) < 0 or dev_fraction + test_fraction >= 1:
        raise UserError(
            f"dev_fraction={dev_fraction} and test_fraction={test_fraction} must be at least 0 "
            "and sum to less than 1"
        )


def _characters(alphabet: str) -> str:
    """The characters of an alphabet, or of the script that it names; "" where there is none."""
    if alphabet == text_lib.FROM_DATA:
        raise UserError("utterances are read once: find their alphabet by fedasr.text.alphabet_of")
    if alphabet in text_lib.SCRIPTS:
        return text_lib.script_alphabet(alphabet)
    if alphabet.isascii() and len(set(alphabet)) < len(alphabet):
        text_lib.script_alphabet(alphabet)  # a name, which is unknown
    return alphabet


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
        `fedasr.data.preparation.conversion.Converter`; its fields are stored as the corpus's
        options.
      notes: read when all utterances are converted.
      write_more: called with the folder when all utterances are converted, before the corpus counts
        as done: for files that belong to it.
      utterances, out and the rest: see `prepare`.

    Returns and raises: see `prepare`.
    """
    told = dataclasses.asdict(converter)
    options = {
        **{name: value for name, value in told.items() if _LATER.get(name, told) != value},
        "characters": converter.characters,
        "dev_fraction": dev_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
    }
    identity = None
    if fingerprint is not None:
        identity = json_digest([_PREPARE_VERSION, records.FORMAT_VERSION, fingerprint, options])

    out = Path(out)
    with prepared_folder(out, identity, overwrite) as finished:
        if finished is not None:
            return finished["summary"]
        parts = out / UNFINISHED / PARTS
        count = parts_lib.convert_all(
            utterances, converter, parts, workers or _cores(), total, progress
        )
        with open(out / SKIPPED_FILE, "w", encoding="utf-8") as skipped_file:
            inputs = accepted(parts_lib.read_rows(parts, count), skipped_file)
        rows, users, skipped = inputs.rows, inputs.users, inputs.skipped
        if not rows:
            raise UserError(nothing_stored(inputs, out))
        by_split, several = divide(rows, dev_fraction, test_fraction, seed)
        splits = {
            split: _ConvertedCorpus(by_user, parts, converter)
            for split, by_user in by_split.items()
        }
        if write_more is not None:
            write_more(out)
        notes = {**(notes or {}), **worth_a_look(inputs, by_split)}
        _write_utterances(out / UTTERANCES_FILE, splits)
        summary = {
            **extent(rows),
            "skipped": skipped,
            "skipped_examples": inputs.examples,
            "unknown_characters": unknown_characters(out / SKIPPED_FILE),
            "users_without_utterances": len(users - {row.user for row in rows}),
            "users_in_several_splits": several,
            "notes": notes,
            "splits": {
                split: extent(row for by_user in corpus.rows for row in by_user)
                for split, corpus in splits.items()
            },
        }
        writing.write_corpus(
            out,
            splits,
            {
                **{"name": name, "identity": identity, "options": options, "summary": summary},
                **({"source": dict(source)} if source else {}),
            },
        )
    return summary


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
            parts_lib.read_signal(self._parts, self.rows[user][i], self._converter) for i in indices
        ]
        return [{self._converter.store: signal, "labels": labels} for signal, labels in read]
