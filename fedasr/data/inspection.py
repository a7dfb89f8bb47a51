"""What would be prepared from a path, found out without preparing it."""

from __future__ import annotations

import dataclasses
import heapq
import os
import random
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fedasr import text as text_lib
from fedasr.data import identity, sources
from fedasr.data.recordings import Recording
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

SUSPICIOUS = 10
_SAMPLE_TAG = "inspect"  # of the random choice of recordings
_FROM_DATA = "--alphabet=from_data"
_SILENT = 1e-3  # of full scale: what is softer all through is no speech
_PACES = 1.0, 30.0  # characters a second between which people speak
_OUTLIER = 4.0  # times the pace of the median recording


@dataclasses.dataclass
class _Texts:
    """What the transcripts are made of."""

    count: int = 0
    characters: int = 0
    words: int = 0
    vocabulary: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)
    writable: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, text: str, language: str) -> bool:
        """Takes a transcript in; whether the language's own alphabet can write it."""
        self.count += 1
        normalised, lost = text_lib.normalize_text(text, language)
        self.characters += len(normalised)
        self.words += len(normalised.split())
        self.vocabulary.update(normalised.split())
        for name, options in _alphabets(language).items():
            self.writable[name] += not text_lib.normalize_text(text, *options)[1]
        unknown = _unknown(text, language) if lost else Counter()
        self.unknown.update(unknown)
        # Letters and the marks on them are what an alphabet of the transcripts would keep.
        letters = all(unicodedata.category(c)[0] in "LM" for c in unknown)
        self.writable[_FROM_DATA] += not lost or (bool(unknown) and letters)
        return not lost


@dataclasses.dataclass
class _Survey:
    """What the items of a source say, and a random sample of them to listen to.

    language: of the alphabets to try. recordings: size of the sample. choice: of the sample.
    suspects: (how much, id, why). files: the first input of each part of a file.
    """

    language: str
    recordings: int
    choice: random.Random
    inputs: int = 0
    texts: _Texts = dataclasses.field(default_factory=_Texts)
    users: Counter[str] = dataclasses.field(default_factory=Counter)
    splits: Counter[str] = dataclasses.field(default_factory=Counter)
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    spellings: set[str] = dataclasses.field(default_factory=set)
    suspects: list[tuple[float, str, str]] = dataclasses.field(default_factory=list)
    sample: list[Utterance] = dataclasses.field(default_factory=list)
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, item: Utterance | Rejected) -> None:
        """Takes an item in."""
        self.inputs += 1
        if isinstance(item, Rejected):
            self.rejected[item.reason] += 1
            self.suspects.append((50.0, item.id, f"{item.reason}: {item.detail}"))
            return
        self.spellings.add(item.user)
        self.users[identity.normalised_user(item.user)] += 1
        self.splits[item.split or ""] += 1
        if not self.texts.add(item.text, self.language):
            outside = f"characters outside the alphabet: {item.text!r}"
            self.suspects.append((20.0, item.id, outside))
        elif not item.text.strip():
            self.suspects.append((60.0, item.id, "no transcript"))
        self.suspects += _seen_before(item, self.files)
        # Reservoir sampling: each is kept with the same chance, however many there are.
        if len(self.sample) < self.recordings:
            self.sample.append(item)
        elif (place := self.choice.randrange(self.texts.count)) < self.recordings:
            self.sample[place] = item
        self.suspects = heapq.nlargest(20 * SUSPICIOUS, self.suspects)

    def notes(self) -> dict[str, int]:
        """Counts of users who may be meant to be others."""
        notes = {}
        if variants := len(self.spellings) - len(self.users):
            notes["user_ids_in_several_spellings"] = variants
        if similar := identity.case_variants(set(self.users)):
            notes["users_differing_by_case_only"] = similar
        return notes


def _alphabets(language: str) -> dict[str, tuple[str, bool]]:
    """Alphabets to try, by the flags that choose them: (language, keep_letters)."""
    found = {f"--language={language}": (language, False)}
    if text_lib.alphabet(language, True) != text_lib.alphabet(language):
        found[f"--language={language} --keep_letters"] = (language, True)
    return found


def _unknown(text: str, language: str) -> Counter[str]:
    """The characters of a text that its alphabet cannot write, one by one."""
    return Counter(c for c in text if text_lib.normalize_text(c, language)[1])


def inspect(
    path: str | os.PathLike[str],
    options: sources.SourceOptions | None = None,
    *,
    layout: str | None = None,
    recordings: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Looks at speech on disk as `prepare` would, and stores nothing.

    Args:
      path: anything that a layout reads.
      options: of the source.
      layout: its name; found out if None.
      recordings: how many are decoded, chosen at random; hours are extrapolated from them.
      seed: of the choice.

    Returns:
      {"layout", "title", "name", "language", "inputs", "utterances", "users", "utterances_per_user"
      {"mean", "min", "max"}, "splits" {split: utterances}, "without_split", "rejected" {reason:
      count}, "notes", "decoded", "unreadable", "hours" (of all, from those decoded), "text"
      {"words_per_utterance", "vocabulary", "characters_per_second"}, "coverage" {flags: share of
      the transcripts that the alphabet can write}, "unknown_characters" {character: count},
      "suspicious" [{"id", "why"}], "command"}.

    Raises:
      UserError: nothing is there, or it is no layout that is known.
    """
    options = options or sources.SourceOptions()
    found = sources.find_layout(layout) if layout else sources.detect_layout(path)
    if found is None:
        raise UserError(_no_layout(Path(path)))
    source = found.open(path, options)
    language = source.language or options.language or "en"
    known = language if language in text_lib.LANGUAGES else "en"
    survey = _Survey(known, recordings, random.Random(f"{_SAMPLE_TAG} {seed}"))
    for item in source:
        survey.add(item)
    texts, sample = survey.texts, survey.sample
    seconds, unreadable, heard = _listened(sample, known)
    suspects = survey.suspects + heard
    good = len(sample) - unreadable
    hours = seconds / 3600 * (texts.count / len(sample)) if sample else 0.0
    counts = list(survey.users.values()) or [0]
    spoken = seconds * texts.count / len(sample) if sample else 0.0
    return {
        "layout": found.name,
        "title": found.title,
        "name": source.name,
        "language": language,
        "inputs": survey.inputs,
        "utterances": texts.count,
        "users": len(survey.users),
        "utterances_per_user": {
            "mean": round(float(np.mean(counts)), 2),
            "min": min(counts),
            "max": max(counts),
        },
        "splits": {name: count for name, count in sorted(survey.splits.items()) if name},
        "without_split": survey.splits[""],
        "rejected": dict(sorted(survey.rejected.items())),
        "notes": {**source.notes, **survey.notes()},
        "decoded": good,
        "unreadable": unreadable,
        "hours": round(hours, 4),
        "text": {
            "words_per_utterance": round(texts.words / max(1, texts.count), 2),
            "vocabulary": len(texts.vocabulary),
            "characters_per_second": round(texts.characters / spoken, 2) if spoken else 0.0,
        },
        "coverage": {
            name: round(count / max(1, texts.count), 4) for name, count in texts.writable.items()
        },
        "unknown_characters": dict(texts.unknown.most_common(20)),
        "suspicious": _worst(suspects),
        "command": _command(found, path, options, language, texts, known),
    }


def _no_layout(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist: give the file or folder of your speech"
    kinds = ", ".join(layout.title for layout in sources.LAYOUTS)
    return (
        f"{path} is none of the layouts that are known ({kinds}): list your recordings in a "
        "manifest, see docs/guides/own_speech.md"
    )


def _seen_before(item: Utterance, files: dict[str, str]) -> list[tuple[float, str, str]]:
    """Whether another input reads the same part of the same file."""
    audio = item.audio
    if not isinstance(audio, Recording):
        return []
    place = identity.file_part(audio.file, audio.start, audio.stop, audio.channel)
    if place is None or (first := files.setdefault(place, item.id)) == item.id:
        return []
    return [(40.0, item.id, f"the same recording as {first!r}")]


def _listened(
    sample: Iterable[Utterance], language: str
) -> tuple[float, int, list[tuple[float, str, str]]]:
    """(seconds decoded, how many cannot be, what is suspicious about any of them)."""
    total, unreadable = 0.0, 0
    suspects: list[tuple[float, str, str]] = []
    heard: dict[str, str] = {}
    paces: list[tuple[float, str, str]] = []
    for item in sample:
        try:
            audio, rate, *_ = item.audio()
            seconds = len(audio) / rate
        except UserError:
            raise
        except Exception as error:
            unreadable += 1
            suspects.append((100.0, item.id, " ".join(str(error).split())[:200]))
            continue
        total += seconds
        first = heard.setdefault(identity.recording_digest(audio, rate), item.id)
        if first != item.id:
            suspects.append((35.0, item.id, f"sounds exactly like {first!r}"))
        peak = float(np.abs(audio).max()) if audio.size else 0.0
        if not peak >= _SILENT:  # NaN, too
            suspects.append((80.0, item.id, f"silence ({seconds:.2f} s, peak {peak:.5f})"))
            continue
        characters = len(text_lib.normalize_text(item.text, language)[0])
        if characters and seconds:
            what = f"{characters} characters in {seconds:.2f} s"
            paces.append((characters / seconds, item.id, what))
        if np.mean(np.abs(audio) >= 0.999) > 0.01:
            suspects.append((8.0, item.id, "more than 1% of its samples are clipped"))
    usual = float(np.median([pace for pace, _, _ in paces])) if paces else 0.0
    least, most = max(_PACES[0], usual / _OUTLIER), min(_PACES[1], usual * _OUTLIER)
    for pace, id, what in paces:
        if not least <= pace <= most:
            off = min(9.0, max(least / pace, pace / most))
            suspects.append((10.0 + off, id, f"{what}: the transcript of another recording?"))
    return total, unreadable, suspects


def _worst(suspects: list[tuple[float, str, str]]) -> list[dict[str, str]]:
    """The most suspicious inputs, each once and not all of one kind."""
    kinds: Counter[float] = Counter()
    ranked = []
    for weight, id, why in sorted(suspects, key=lambda x: (-x[0], x[1])):
        kinds[round(weight)] += 1  # the third of a kind says less than the first of another
        ranked.append((weight / kinds[round(weight)] ** 0.5, id, why))
    found: dict[str, str] = {}
    for _, id, why in sorted(ranked, key=lambda x: (-x[0], x[1])):
        found.setdefault(id, why[:300])
    return [{"id": id, "why": why} for id, why in list(found.items())[:SUSPICIOUS]]


def _command(
    layout: sources.Layout,
    path: str | os.PathLike[str],
    options: sources.SourceOptions,
    language: str,
    texts: _Texts,
    known: str,
) -> str:
    """The command that prepares it."""
    flags = [f"--dataset={layout.name}", f"--source={os.fspath(path)}", "--out=data/mine"]
    if language != "en" or options.language:
        flags.append(f"--language={language}")
    for name in ("user_key", "text_key", "audio_key"):
        if value := getattr(options, name):
            flags.append(f"--{name}={value}")
    if options.metadata:
        flags.append(f"--metadata={','.join(options.metadata)}")
    if options.pipes:
        flags.append("--pipes")
    own = f"--language={known} --keep_letters"
    plain = texts.writable[f"--language={known}"]
    if texts.writable[_FROM_DATA] > max(plain, texts.writable[own]):
        flags.append(_FROM_DATA)
    elif texts.writable[own] > plain:
        flags.append("--keep_letters")
    return shlex.join(["fedasr", "prepare", *flags])
