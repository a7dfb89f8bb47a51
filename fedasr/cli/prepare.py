"""Prepares speech for training: features computed once, stored by user.

    fedasr prepare --inspect=PATH
    fedasr prepare --dataset=manifest --source=speech.jsonl --out=DIR
    fedasr prepare --dataset=librispeech --source=LibriSpeech --out=DIR
    fedasr prepare --dataset=common_voice --source=cv-corpus-13.0/en --out=DIR
    fedasr prepare --dataset=neural --source=competitionData --out=DIR
    fedasr prepare --verify --out=DIR

`--inspect` says what would be prepared, and with which command, and stores nothing. A manifest
lists recordings with `audio_filepath`, `text` and `user`: JSON lines, a JSON array, CSV or TSV.
LibriSpeech, Common Voice, TED-LIUM, Kaldi data directories, lhotse manifests and audio datasets of
Hugging Face are read as they lie on disk (see `fedasr.data.sources`). Neural recordings are a
folder of MATLAB or TFRecord files, or a manifest of arrays, see `fedasr.data.neural`. The same
command goes on with a preparation that was interrupted. `--verify` decodes again what is stored,
and its sources. The summary goes to stdout, everything else to stderr.
Exit status: 0 when the corpus is ready, 1 where --verify finds a difference, 2 for a mistake that
the user can mend.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from fedasr import text
from fedasr.cli import common
from fedasr.data import records, sources
from fedasr.data.preparation.conversion import STORES
from fedasr.data.preparation.prepare import prepare
from fedasr.data.preparation.progress import progress_bar
from fedasr.data.preparation.summary import SKIPPED_FILE, describe_unknown
from fedasr.data.utterances import Utterance
from fedasr.errors import UserError

_DATASETS = ["synthetic", "neural", *(layout.name for layout in sources.LAYOUTS)]


def run() -> dict[str, Any]:
    """Prepares what the flags ask for and returns the summary of `prepare`."""
    if not flags.FLAGS.dataset:
        raise UserError(f"--dataset is missing: give one of {', '.join(_DATASETS)}")
    if not flags.FLAGS.out:
        raise UserError("--out is missing: give the folder to write")
    if flags.FLAGS.dataset == "synthetic":
        return _synthetic()
    if not flags.FLAGS.source:
        raise UserError(f"--source is missing: give the speech of --dataset={flags.FLAGS.dataset}")
    if flags.FLAGS.dataset == "neural":
        return _neural(flags.FLAGS.source)
    source, facts = _opened(flags.FLAGS.dataset, flags.FLAGS.source)
    written = _written(facts["language"])
    with progress_bar("preparing speech") as progress:
        return prepare(
            source,
            flags.FLAGS.out,
            keep_letters=flags.FLAGS.keep_letters,
            **written,
            rules="published" if flags.FLAGS.text_rules == "published" else "",
            store=flags.FLAGS.store,
            workers=flags.FLAGS.workers,
            dev_fraction=flags.FLAGS.dev_fraction,
            test_fraction=flags.FLAGS.test_fraction,
            seed=flags.FLAGS.seed,
            progress=progress,
            overwrite=flags.FLAGS.overwrite,
            source={
                "dataset": flags.FLAGS.dataset,
                "path": os.path.abspath(flags.FLAGS.source),
                **dataclasses.asdict(_options()),
            },
            **facts,
        )


def _written(language: str) -> dict[str, Any]:
    """What labels are written in, as arguments of `prepare`."""
    if flags.FLAGS.tokenizer:
        found = text.prepared_with(flags.FLAGS.tokenizer)
        if "alphabet" in found and (flags.FLAGS.alphabet or flags.FLAGS.keep_letters):
            raise UserError("--tokenizer has its own characters: leave --alphabet and letters out")
        return {"alphabet": flags.FLAGS.alphabet or "", **found}
    if flags.FLAGS.alphabet != text.FROM_DATA:
        return {
            "alphabet": text.script_alphabet(flags.FLAGS.alphabet) if flags.FLAGS.alphabet else ""
        }
    if flags.FLAGS.keep_letters:
        raise UserError("--alphabet=from_data keeps all letters: leave --keep_letters out")
    source, _ = _opened(flags.FLAGS.dataset, flags.FLAGS.source)  # once more: a source is read once
    texts = (item.text for item in source if isinstance(item, Utterance))
    alphabet = text.alphabet_of(texts, language, flags.FLAGS.alphabet_min_count)
    return {"alphabet": alphabet, "learned": True}


def _opened(dataset: str, path: str) -> tuple[Any, dict[str, Any]]:
    """Utterances of a data set, and what is known of them as arguments of `prepare`."""
    source = sources.find_layout(dataset).open(path, _options())
    facts = {name: getattr(source, name) for name in ("name", "fingerprint", "total", "notes")}
    return source, {**facts, "language": source.language or flags.FLAGS.language or "en"}


def _options() -> sources.SourceOptions:
    return sources.SourceOptions(
        language=flags.FLAGS.language,
        user_key=flags.FLAGS.user_key,
        text_key=flags.FLAGS.text_key,
        audio_key=flags.FLAGS.audio_key,
        metadata=tuple(flags.FLAGS.metadata or ()),
        pipes=flags.FLAGS.pipes,
    )


def _neural(path: str) -> dict[str, Any]:
    from fedasr.data import neural

    areas = neural.parse_areas(flags.FLAGS.areas) if flags.FLAGS.areas else None
    with progress_bar("preparing recordings") as progress:
        return neural.prepare_sessions(
            neural.NeuralSessions(path, areas),
            flags.FLAGS.out,
            stride=flags.FLAGS.stride,
            language=flags.FLAGS.language or "en",
            keep_letters=flags.FLAGS.keep_letters,
            lexicon=flags.FLAGS.lexicon,
            labels=flags.FLAGS.labels or "",
            g2p=flags.FLAGS.g2p,
            final_silence=flags.FLAGS.final_silence,
            workers=flags.FLAGS.workers,
            progress=progress,
            overwrite=flags.FLAGS.overwrite,
        )


def _synthetic() -> dict[str, Any]:
    from fedasr.data import synthetic

    if flags.FLAGS.keep_letters or (flags.FLAGS.language or "en") != "en":
        raise UserError("the synthetic speech is English: leave --language and --keep_letters out")
    if flags.FLAGS.alphabet or flags.FLAGS.tokenizer:
        raise UserError("the synthetic speech is English: leave --alphabet and --tokenizer out")
    config = synthetic.SyntheticConfig(task=flags.FLAGS.task, seed=flags.FLAGS.seed)
    synthetic.prepare_synthetic(
        config, flags.FLAGS.out, overwrite=flags.FLAGS.overwrite, store=flags.FLAGS.store
    )
    return records.read_metadata(flags.FLAGS.out)["summary"]


def _inspect() -> None:
    """Prints what `fedasr.data.inspection.inspect` finds."""
    from fedasr.data import inspection

    found = inspection.inspect(
        flags.FLAGS.inspect,
        _options(),
        layout=flags.FLAGS.dataset,
        recordings=flags.FLAGS.inspect_recordings,
    )
    if common.JSON.value:
        common.show(found)
        return
    print(f"{flags.FLAGS.inspect} looks like {found['title']}, language {found['language']}")
    each = found["utterances_per_user"]
    sampled = "" if found["decoded"] == found["utterances"] else ", estimated"
    print(
        f"  {found['users']} users, {found['utterances']} utterances ({each['min']} to "
        f"{each['max']} per user, mean {each['mean']}), {found['hours']:.2f} hours{sampled}"
    )
    for name, count in found["splits"].items():
        print(f"  {name}: {count} utterances")
    if found["without_split"]:
        print(f"  without a split: {found['without_split']} (some users are held out, see --seed)")
    text = found["text"]
    print(
        f"  text: {text['words_per_utterance']} words per utterance, {text['vocabulary']} "
        f"different words, {text['characters_per_second']} characters per second"
    )
    for name, share in found["coverage"].items():
        print(f"  {name} can write {100 * share:.1f}% of the transcripts")
    if found["unknown_characters"]:
        shown = ", ".join(f"{c!r} {n}" for c, n in found["unknown_characters"].items())
        print(f"  characters that it cannot write: {shown}")
    for reason, count in found["rejected"].items():
        print(f"  would be skipped, {reason}: {count}")
    if found["unreadable"]:
        print(f"  unreadable: {found['unreadable']} of {found['unreadable'] + found['decoded']}")
    for key, count in found["notes"].items():
        print(f"  {key.replace('_', ' ')}: {count}")
    if found["suspicious"]:
        print("  most suspicious:")
    for item in found["suspicious"]:
        print(f"    {item['id']}: {item['why']}")
    print(f"prepare it with\n  {found['command']}")


def _verify() -> int:
    """Prints what `fedasr.data.verification.verify` finds; returns the exit status."""
    from fedasr.data import verification

    if not flags.FLAGS.out:
        raise UserError("--out is missing: give the folder of the corpus to verify")
    path, source = _source_to_compare()
    report = verification.verify(flags.FLAGS.out, source)
    if common.JSON.value:
        common.show(report)
    else:
        compared_with = "" if source is None else path
        print("\n".join(_verified_in_words(report, compared_with)))
    return 0 if verification.is_same(report) else common.FAILED


def _source_to_compare() -> tuple[str, Any]:
    """What --out was prepared from, by the flags or by what is stored with it: path and source.

    The source is None where that is not known.
    """
    known = dict(records.read_metadata(flags.FLAGS.out).get("source") or {})
    stored_dataset, stored_path = known.pop("dataset", None), known.pop("path", None)
    dataset, path = flags.FLAGS.dataset or stored_dataset, flags.FLAGS.source or stored_path
    if dataset not in {layout.name for layout in sources.LAYOUTS} or not path:
        return path or "", None
    options = sources.SourceOptions(**known) if not flags.FLAGS.source else _options()
    options = dataclasses.replace(options, metadata=tuple(options.metadata))
    return path, sources.find_layout(dataset).open(path, options)


def _verified_in_words(report: Mapping[str, Any], path: str) -> Iterator[str]:
    """For people; `path` is what the corpus was compared with, "" for nothing."""
    damaged = len(report["damaged"])
    yield f"{flags.FLAGS.out}: {report['stored']} utterances stored, {damaged} damaged"
    if path:
        yield f"  {report['compared']} compared with {path}: {report['same']} the same"
    else:
        yield "  what it was prepared from is not known: give --dataset and --source to compare"
    for key in ("damaged", "different", "no_longer_there", "new"):
        items = report.get(key, [])
        for item in items[:10]:
            shown = f"{item['id']}: {item['why']}" if isinstance(item, dict) else item
            yield f"  {key.replace('_', ' ')}: {shown}"
        if (more := len(items) - 10) > 0:
            yield f"  {key.replace('_', ' ')}: {more} more (all with --json)"


def program() -> int | None:
    """Prepares and prints the summary; or inspects, or verifies."""
    if flags.FLAGS.inspect:
        _inspect()
        return None
    if flags.FLAGS.verify:
        return _verify()
    summary = run()
    if common.JSON.value:
        common.show(summary)
        return None
    print(f"{flags.FLAGS.out}: {_describe(summary)}")
    for name, split in summary["splits"].items():
        print(f"  {name}: {_describe(split)}")
    for reason, count in summary["skipped"].items():
        example = summary.get("skipped_examples", {}).get(reason)
        shown = f"; for example {example[:200]}" if example else ""
        print(f"  skipped, {reason}: {count} (listed in {flags.FLAGS.out}/{SKIPPED_FILE}{shown})")
        if reason == "unknown_characters":
            print(f"    {describe_unknown(summary['unknown_characters'])}")
    others = {key: summary[key] for key in ("users_without_utterances", "users_in_several_splits")}
    for key, count in (others | summary["notes"]).items():
        if count:
            print(f"  {key.replace('_', ' ')}: {count}")
    return None


def _describe(part: dict[str, Any]) -> str:
    minutes = part["minutes_per_user"]
    return (
        f"{part['users']} users, {part['utterances']} utterances, {part['hours']:.2f} hours "
        f"({minutes['mean']:.2f} minutes per user, std {minutes['std']:.2f}, "
        f"{minutes['min']:.2f} to {minutes['max']:.2f})"
    )


def _define_flags() -> None:
    flags.DEFINE_enum("dataset", None, _DATASETS, "Where the speech comes from.")
    flags.DEFINE_string("source", None, "The manifest, or the folder or archive of a corpus.")
    flags.DEFINE_string("out", None, "Folder of the corpus: new, empty, or holding the same.")
    flags.DEFINE_string(
        "inspect", None, "Say what would be prepared from this path, and prepare nothing."
    )
    flags.DEFINE_integer("inspect_recordings", 500, "So many are decoded by --inspect.")
    flags.DEFINE_bool(
        "verify",
        False,
        "Decode again what --out holds, and what it was prepared from, and compare.",
    )
    flags.DEFINE_string(
        "language",
        None,
        f"Of the transcripts: {', '.join(text.LANGUAGES)}. Default: en, or what Common Voice's "
        "folder is named; needed where --source has several.",
    )
    flags.DEFINE_bool(
        "keep_letters",
        False,
        "Keep the language's own letters (é, ä, ß) instead of folding to a-z.",
    )
    flags.DEFINE_string(
        "alphabet",
        None,
        f"In place of the language's: {text.FROM_DATA} (all letters of the transcripts), or one of "
        f"{', '.join(text.SCRIPTS)}.",
    )
    flags.DEFINE_enum(
        "text_rules",
        "words",
        ["words", "published"],
        "published: as the programs of arXiv 2310.00098 write transcripts, leaving out digits, "
        "signs and punctuation; words: as they are said, and who cannot be written is skipped.",
    )
    flags.DEFINE_integer(
        "alphabet_min_count", 1, "With from_data: characters that occur less often are left out."
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "In place of an alphabet: a SentencePiece model, a tokenizer.json, or a model's folder.",
    )
    flags.DEFINE_enum(
        "store", "features", list(STORES), "audio: features are computed whenever they are read."
    )
    flags.DEFINE_integer("workers", 0, "Processes that convert; 0: one for each core.")
    flags.DEFINE_enum(
        "task", "digits", ["digits", "commands", "fresh"], "What is said, for --dataset=synthetic."
    )
    flags.DEFINE_integer("seed", 0, "Of the synthetic speech, or of the dev and test users.")
    flags.DEFINE_string(
        "areas",
        None,
        "Channels of neural recordings; default tx1[0:128],spikePow[0:128], or all that a "
        "manifest has.",
    )
    flags.DEFINE_string(
        "user_key",
        None,
        "Field or column of the user; default user, speaker, speaker_id or client_id.",
    )
    flags.DEFINE_string("text_key", None, "Field or column of the transcript.")
    flags.DEFINE_string("audio_key", None, "Field or column of the recording.")
    flags.DEFINE_list(
        "metadata",
        None,
        "Further fields to carry through, beside age, gender, accents and the like.",
    )
    flags.DEFINE_bool("pipes", False, "kaldi: run the commands that wav.scp holds.")
    flags.DEFINE_string(
        "lexicon", None, "neural: pronunciations in the form of CMUdict; labels are then phonemes."
    )
    flags.DEFINE_enum(
        "labels",
        None,
        ["characters", "phonemes", "handwriting"],
        "neural: what sentences are written in; default characters, or phonemes with --lexicon.",
    )
    flags.DEFINE_bool(
        "g2p", False, "neural: g2p_en pronounces the words that --lexicon lacks (extra g2p)."
    )
    flags.DEFINE_bool(
        "final_silence", False, "neural: silence after the last word, too, as published."
    )
    flags.DEFINE_integer("stride", 4, "Bins of neural recordings per output of the model.")
    flags.DEFINE_float("dev_fraction", 0.1, "Share of undivided users held out for dev.")
    flags.DEFINE_float("test_fraction", 0.1, "Share of undivided users held out for test.")
    flags.DEFINE_bool("overwrite", False, "Replace another corpus in --out.")


def main() -> None:
    """The command `fedasr prepare`: parses the flags, runs and exits."""
    _define_flags()
    common.main(program, __name__)


if __name__ == "__main__":
    main()
