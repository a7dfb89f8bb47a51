"""Word and character error rates of a trained recogniser on a prepared corpus.

    fedasr evaluate --checkpoint=DIR --data=DIR [--split=test] [--json]

The checkpoint is a work directory of `fedasr train` (its last checkpoint), or one checkpoint's
folder. If the run had local parameters and they are still beside it, users who have trained are
evaluated with their own. Exit status: 0 when done, 2 for a mistake that the user can mend.
"""

import sys

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError


def run() -> None:
    """Evaluates and prints {"wer", "cer", "loss", "utterances", ...}."""
    if not flags.FLAGS.checkpoint or not flags.FLAGS.data:
        raise UserError("--checkpoint and --data are needed: give both folders")
    common.configure_devices()
    from fedasr.data.records import open_corpus
    from fedasr.data.records import read_metadata as read_corpus_metadata
    from fedasr.training.builders.corpora import fitting_tokenizer
    from fedasr.training.builders.models import build_recogniser
    from fedasr.training.checkpoint import read_metadata, restore_params
    from fedasr.training.evaluation import Evaluator, evaluation_buckets
    from fedasr.training.rows import local_rows
    from fedasr.training.workdir import recorded_config

    corpus = open_corpus(flags.FLAGS.data, flags.FLAGS.split)
    metadata = read_metadata(flags.FLAGS.checkpoint)
    params = restore_params(flags.FLAGS.checkpoint)
    config = recorded_config(metadata["config"])
    recogniser = build_recogniser(config)
    buckets = evaluation_buckets([corpus])
    tokenizer = fitting_tokenizer(config, read_corpus_metadata(flags.FLAGS.data))
    layout, rows = local_rows(flags.FLAGS.checkpoint, params, corpus, flags.FLAGS.data)
    if rows is None and config.local.patterns:
        text = "warning: users' own parameters are not beside the checkpoint, or of other data"
        print(text, file=sys.stderr)
    evaluator = Evaluator(
        recogniser,
        buckets,
        flags.FLAGS.batch_size,
        tokenizer=tokenizer,
        layout=layout,
        published=config.evaluation.published,
    )
    rates = evaluator(params, corpus, rows)
    common.show(
        {
            **rates,
            "split": flags.FLAGS.split,
            "decoder": flags.FLAGS.decoder,
            "utterances": int(corpus.sizes.sum()),
            "users": len(corpus.users),
            "stage": metadata["stage"],
            "rounds": metadata["units"],
        }
    )


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A work directory or one checkpoint.")
    flags.DEFINE_string("data", None, "A folder written by `fedasr prepare`.")
    flags.DEFINE_string("split", "test", "Which split of it.")
    flags.DEFINE_enum("decoder", "greedy", ["greedy"], "How tokens are chosen.")
    flags.DEFINE_integer("batch_size", 32, "Utterances at a time.")


def main() -> None:
    """The command `fedasr evaluate`: parses the flags, runs and exits."""
    _define_flags()
    common.main(run, __name__)


if __name__ == "__main__":
    main()
