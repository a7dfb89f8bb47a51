"""Word and character error rates of a trained recogniser on a prepared corpus.

    python -m experiments.evaluate --checkpoint=DIR --data=DIR [--split=test] [--json]

The checkpoint is a work directory of `experiments.train` (its last checkpoint), or one checkpoint's
folder. If the run had local parameters and they are still beside it, users who have trained are
evaluated with their own. Exit status: 0 when done, 2 for a mistake that the user can mend.
"""

import sys

from absl import flags

from experiments import cli
from fedasr.errors import UserError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A work directory or one checkpoint.")
_DATA = flags.DEFINE_string("data", None, "A folder written by experiments.prepare_data.")
_SPLIT = flags.DEFINE_string("split", "test", "Which split of it.")
_DECODER = flags.DEFINE_enum("decoder", "greedy", ["greedy"], "How tokens are chosen.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Utterances at a time.")


def run() -> None:
    """Evaluates and prints {"wer", "cer", "loss", "utterances", ...}."""
    if not _CHECKPOINT.value or not _DATA.value:
        raise UserError("--checkpoint and --data are needed: give both folders")
    cli.configure_devices()
    from fedasr.data.corpus import open_corpus
    from fedasr.data.corpus import read_metadata as read_corpus_metadata
    from fedasr.training.builders.corpora import fitting_tokenizer
    from fedasr.training.builders.models import build_recogniser
    from fedasr.training.checkpoint import read_metadata, restore_params
    from fedasr.training.evaluation import Evaluator, evaluation_buckets
    from fedasr.training.rows import local_rows
    from fedasr.training.workdir import recorded_config

    corpus = open_corpus(_DATA.value, _SPLIT.value)
    metadata = read_metadata(_CHECKPOINT.value)
    params = restore_params(_CHECKPOINT.value)
    config = recorded_config(metadata["config"])
    recogniser = build_recogniser(config)
    buckets = evaluation_buckets([corpus])
    tokenizer = fitting_tokenizer(config, read_corpus_metadata(_DATA.value))
    layout, rows = local_rows(_CHECKPOINT.value, params, corpus, _DATA.value)
    if rows is None and config.local.patterns:
        text = "warning: users' own parameters are not beside the checkpoint, or of other data"
        print(text, file=sys.stderr)
    evaluator = Evaluator(recogniser, buckets, _BATCH.value, tokenizer=tokenizer, layout=layout)
    rates = evaluator(params, corpus, rows)
    cli.show(
        {
            **rates,
            "split": _SPLIT.value,
            "decoder": _DECODER.value,
            "utterances": int(corpus.sizes.sum()),
            "users": len(corpus.users),
            "stage": metadata["stage"],
            "rounds": metadata["units"],
        }
    )


if __name__ == "__main__":
    cli.main(run)
