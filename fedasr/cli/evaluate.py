"""Word and character error rates of a trained recogniser on a prepared corpus.

    fedasr evaluate --checkpoint=DIR --data=DIR [--split=test] [--json]
                    [--decoder=beam|lexicon --lm=FILE.arpa|from_train --lexicon=FILE|from_train]
                    [--hypotheses=FILE.jsonl] [--fine_tune=SPLIT]

The checkpoint is a work directory of `fedasr train` (its last checkpoint), or one checkpoint's
folder. If the run had local parameters and they are still beside it, users who have trained are
evaluated with their own. How texts are found in the scores is as the run was told
(`config.decoding`), unless flags say otherwise; a language model in an ARPA file may come from
KenLM, one "from_train" is made from the transcripts of that split of the data. --hypotheses writes
a line for each utterance: user, reference, hypothesis, their alignment and errors, and what the
data's source said of it (see `fedasr.evaluation.hypotheses`). "served" has the errors by user:
mean, spread, worst tenth, and gaps between groups, each with a 95% interval over users.
With --fine_tune the model is evaluated once more, after each user has adapted it to that split's
speech of their own; its utterances are to be others. "fine_tuned" has the same figures of that.
Exit status: 0 when done, 2 for a mistake that the user can mend.
"""

import sys
from typing import Any

from absl import flags

from fedasr.cli import common, decoding
from fedasr.errors import UserError


def run() -> None:
    """Evaluates and prints {"wer", "cer", "loss", "utterances", ...}."""
    if not flags.FLAGS.checkpoint or not flags.FLAGS.data:
        raise UserError("--checkpoint and --data are needed: give both folders")
    common.configure_devices()
    from fedasr.data.records import read_metadata as read_corpus_metadata
    from fedasr.evaluation.hypotheses import write_hypotheses
    from fedasr.training import served
    from fedasr.training.builders.corpora import fitting_tokenizer, open_split
    from fedasr.training.builders.decoders import make_run_decoder
    from fedasr.training.builders.models import build_recogniser
    from fedasr.training.checkpoint import read_metadata, restore_params
    from fedasr.training.evaluation import Evaluator, evaluation_buckets
    from fedasr.training.remote.copies import local
    from fedasr.training.rows import local_rows
    from fedasr.training.workdir import recorded_config

    checkpoint = local(flags.FLAGS.checkpoint)
    metadata = read_metadata(checkpoint)
    params = restore_params(checkpoint)
    config = recorded_config(metadata["config"])
    corpus = open_split(flags.FLAGS.data, flags.FLAGS.split, config)
    recogniser = build_recogniser(config)
    buckets = evaluation_buckets([corpus])
    tokenizer = fitting_tokenizer(config, read_corpus_metadata(flags.FLAGS.data))
    layout, rows = local_rows(checkpoint, params, corpus, flags.FLAGS.data)
    if rows is None and config.local.patterns:
        text = "warning: users' own parameters are not beside the checkpoint, or of other data"
        print(text, file=sys.stderr)
    settings = decoding.settings(config.decoding)
    decoder = make_run_decoder(settings, flags.FLAGS.data, tokenizer, [flags.FLAGS.split])
    evaluator = Evaluator(
        recogniser,
        buckets,
        flags.FLAGS.batch_size,
        tokenizer=tokenizer,
        layout=layout,
        published=config.evaluation.published,
        decoder=decoder,
    )
    decoded, loss = evaluator.decoded(params, corpus, rows)
    rates: dict[str, Any] = dict(evaluator.rates(decoded, loss))
    if flags.FLAGS.fine_tune:
        rates["fine_tuned"] = _fine_tuned(evaluator, recogniser, params, corpus)
    found = served.hypotheses_of(flags.FLAGS.data, flags.FLAGS.split, corpus, decoded)
    if flags.FLAGS.hypotheses:
        write_hypotheses(flags.FLAGS.hypotheses, found)
    common.show(
        {
            **rates,
            "split": flags.FLAGS.split,
            "decoder": settings.name,
            **{name: value for name in ("lm", "lexicon") if (value := getattr(settings, name))},
            "utterances": int(corpus.sizes.sum()),
            "users": len(corpus.users),
            "served": served.in_short(served.describe_users(found, None)),
            "stage": metadata["stage"],
            "rounds": metadata["units"],
        }
    )


def _fine_tuned(evaluator: Any, recogniser: Any, params: Any, corpus: Any) -> dict[str, Any]:
    """Rates of users who first adapt the model to another split of the same data.

    Raises:
      UserError: that split shares an utterance with the evaluated one, or lacks one of its users.
    """
    from fedasr.data.records import open_corpus
    from fedasr.training import served
    from fedasr.training.fine_tuning import evaluate_fine_tuned

    values = flags.FLAGS
    if values.fine_tune == values.split:
        raise UserError(
            "--fine_tune must be other speech than --split: such as --split='test[:][50%:]' "
            "--fine_tune='test[:][:50%]'"
        )
    if values.fine_tune_rate <= 0 or values.fine_tune_epochs < 1:
        raise UserError("--fine_tune_rate must be above 0, --fine_tune_epochs at least 1")
    adapted = open_corpus(values.data, values.fine_tune)
    decoded = evaluate_fine_tuned(
        evaluator,
        recogniser,
        params,
        adapted,
        corpus,
        rate=values.fine_tune_rate,
        epochs=values.fine_tune_epochs,
    )
    found = served.hypotheses_of(values.data, values.split, corpus, decoded)
    short = served.in_short(served.describe_users(found, None))
    return {"wer": short["all"], "served": short}


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A work directory or one checkpoint.")
    flags.DEFINE_string("data", None, "A folder written by `fedasr prepare`.")
    flags.DEFINE_string("split", "test", "Which split of it.")
    flags.DEFINE_string("hypotheses", None, "File for each utterance's texts, JSON a line.")
    flags.DEFINE_string("fine_tune", "", "Split that each user's own model first adapts to.")
    flags.DEFINE_float("fine_tune_rate", 0.1, "Learning rate of that.")
    flags.DEFINE_integer("fine_tune_epochs", 1, "Passes of that.")
    decoding.define_flags()
    flags.DEFINE_integer("batch_size", 32, "Utterances at a time.")


def main() -> None:
    """The command `fedasr evaluate`: parses the flags, runs and exits."""
    _define_flags()
    common.main(run, __name__, urls=["checkpoint"])


if __name__ == "__main__":
    main()
