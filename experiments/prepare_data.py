"""Prepares speech for training: features computed once, stored by user.

    python -m experiments.prepare_data --dataset=manifest --source=speech.jsonl --out=DIR

A manifest holds one JSON object a line with `audio_filepath`, `text` and `user`. The summary goes
to stdout, everything else to stderr. Exit status: 0 when the corpus is ready, 2 for a mistake that
the user can mend.
"""

from absl import flags

from experiments import cli
from fedasr.data import corpus, prepare
from fedasr.errors import UserError

_DATASET = flags.DEFINE_enum(
    "dataset", None, ["synthetic", "manifest"], "Where the speech comes from."
)
_SOURCE = flags.DEFINE_string("source", None, "The manifest, for --dataset=manifest.")
_OUT = flags.DEFINE_string("out", None, "Folder of the corpus: new, empty, or holding the same.")
_TASK = flags.DEFINE_enum(
    "task", "digits", ["digits", "commands"], "What is said, for --dataset=synthetic."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the synthetic speech, or of the dev and test users.")
_DEV = flags.DEFINE_float("dev_fraction", 0.1, "Share of undivided users held out for dev.")
_TEST = flags.DEFINE_float("test_fraction", 0.1, "Share of undivided users held out for test.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another corpus in --out.")


def run() -> dict:
    """Prepares what the flags ask for and returns the summary of `prepare.prepare`."""
    if not _DATASET.value:
        raise UserError("--dataset is missing: give synthetic or manifest")
    if not _OUT.value:
        raise UserError("--out is missing: give the folder to write")
    if _DATASET.value == "synthetic":
        from fedasr.data import synthetic

        config = synthetic.SyntheticConfig(task=_TASK.value, seed=_SEED.value)
        prepare.prepare_synthetic(config, _OUT.value, overwrite=_OVERWRITE.value)
        return corpus.read_metadata(_OUT.value)["summary"]

    from fedasr.data import manifest

    if not _SOURCE.value:
        raise UserError("--source is missing: give the path of the manifest")
    fingerprint, lines = manifest.manifest_fingerprint(_SOURCE.value)
    with prepare.progress_bar("preparing speech") as progress:
        return prepare.prepare(
            manifest.read_manifest(_SOURCE.value),
            _OUT.value,
            name=f"manifest {_SOURCE.value}",
            fingerprint=fingerprint,
            dev_fraction=_DEV.value,
            test_fraction=_TEST.value,
            seed=_SEED.value,
            total=lines,
            progress=progress,
            overwrite=_OVERWRITE.value,
        )


def program() -> None:
    """Prepares and prints the summary."""
    summary = run()
    if cli.JSON.value:
        cli.show(summary)
        return
    print(f"{_OUT.value}: {_describe(summary)}")
    for name, split in summary["splits"].items():
        print(f"  {name}: {_describe(split)}")
    for reason, count in summary["skipped"].items():
        print(f"  skipped, {reason}: {count} (listed in {prepare.SKIPPED_FILE})")
    for key in ("users_without_utterances", "users_in_several_splits"):
        if summary[key]:
            print(f"  {key.replace('_', ' ')}: {summary[key]}")


def _describe(part: dict) -> str:
    return f"{part['users']} users, {part['utterances']} utterances, {part['hours']:.2f} hours"


if __name__ == "__main__":
    cli.main(program)
