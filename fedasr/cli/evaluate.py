"""Word and character error rates of a trained recogniser on a prepared corpus.

    fedasr evaluate --checkpoint=DIR --data=DIR [--split=test] [--json]
                    [--decoder=beam|lexicon --lm=FILE.arpa|from_train --lexicon=FILE|from_train]
                    [--hypotheses=FILE.jsonl]

The checkpoint is a work directory of `fedasr train` (its last checkpoint), or one checkpoint's
folder. If the run had local parameters and they are still beside it, users who have trained are
evaluated with their own. How texts are found in the scores is as the run was told
(`config.decoding`), unless flags say otherwise; a language model in an ARPA file may come from
KenLM, one "from_train" is made from the transcripts of that split of the data. --hypotheses writes
a line for each utterance: the user, its id (in a split that is made of others its number among the
user's), reference and hypothesis. Exit status: 0 when done, 2 for a mistake that the user can mend.
"""

import json
import sys
from pathlib import Path
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
    from fedasr.training.builders.corpora import fitting_tokenizer, open_split
    from fedasr.training.builders.decoders import make_run_decoder
    from fedasr.training.builders.models import build_recogniser
    from fedasr.training.checkpoint import read_metadata, restore_params
    from fedasr.training.evaluation import Evaluator, evaluation_buckets
    from fedasr.training.rows import local_rows
    from fedasr.training.workdir import recorded_config

    metadata = read_metadata(flags.FLAGS.checkpoint)
    params = restore_params(flags.FLAGS.checkpoint)
    config = recorded_config(metadata["config"])
    corpus = open_split(flags.FLAGS.data, flags.FLAGS.split, config)
    recogniser = build_recogniser(config)
    buckets = evaluation_buckets([corpus])
    tokenizer = fitting_tokenizer(config, read_corpus_metadata(flags.FLAGS.data))
    layout, rows = local_rows(flags.FLAGS.checkpoint, params, corpus, flags.FLAGS.data)
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
    rates = evaluator.rates(decoded, loss)
    if flags.FLAGS.hypotheses:
        ids = _utterance_ids(flags.FLAGS.data, flags.FLAGS.split)
        _write_hypotheses(flags.FLAGS.hypotheses, decoded, corpus.users, ids)
    common.show(
        {
            **rates,
            "split": flags.FLAGS.split,
            "decoder": settings.name,
            **{name: value for name in ("lm", "lexicon") if (value := getattr(settings, name))},
            "utterances": int(corpus.sizes.sum()),
            "users": len(corpus.users),
            "stage": metadata["stage"],
            "rounds": metadata["units"],
        }
    )


def _utterance_ids(directory: str, split: str) -> dict[str, list[str]]:
    """Ids of a stored split's utterances by user, in its order; {} where they are not known."""
    from fedasr.data.preparation.prepare import UTTERANCES_FILE

    found: dict[str, list[str]] = {}
    try:
        with (Path(directory) / UTTERANCES_FILE).open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if row["split"] == split:
                    found.setdefault(row["user"], []).append(row["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def _write_hypotheses(path: str, decoded: Any, users: Any, ids: dict[str, list[str]]) -> None:
    """One JSON object a line: user, utterance, reference, hypothesis; in the corpus's order.

    An utterance is named by its id or, in splits made of others, by its number among the user's.

    Raises:
      UserError: the file cannot be written.
    """

    def name(one: Any) -> str | int:
        own = ids.get(users[one.user], [])
        return own[one.place] if one.place < len(own) else one.place

    rows = [
        {
            "user": users[one.user],
            "utterance": name(one),
            "reference": one.reference,
            "hypothesis": one.hypothesis,
        }
        for one in sorted(decoded)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        Path(path).write_text(text, encoding="utf-8", errors="surrogatepass")
    except OSError as error:
        raise UserError(f"--hypotheses={path} cannot be written: {error.strerror}") from error


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A work directory or one checkpoint.")
    flags.DEFINE_string("data", None, "A folder written by `fedasr prepare`.")
    flags.DEFINE_string("split", "test", "Which split of it.")
    flags.DEFINE_string("hypotheses", None, "File for each utterance's texts, JSON a line.")
    decoding.define_flags()
    flags.DEFINE_integer("batch_size", 32, "Utterances at a time.")


def main() -> None:
    """The command `fedasr evaluate`: parses the flags, runs and exits."""
    _define_flags()
    common.main(run, __name__)


if __name__ == "__main__":
    main()
