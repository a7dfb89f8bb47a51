"""Decodes a split into a file, a sentence a line: a submission where the texts are withheld.

    fedasr decode --checkpoint=DIR --data=DIR --out=submission.txt [--split=competitionHoldOut]
                  [--lm=FILE.arpa --pronunciations=cmudict.txt --blank_penalty=0.69]
                  [--rescorer=MODEL --nbest=10] [--json]

Sentences are in the order of days and, within a day, as they were recorded, as the competition of
brain-to-text wants them. Labels that are phonemes need pronunciations of words. --rescorer is a
causal language model of `transformers` (a folder, or a name such as gpt2-xl), which chooses among
the n best. As published: --blank_penalty=0.69 (ln 2) for speech, 2.4 (ln 11) for handwriting.
Exit status: 0 when done, 2 for a mistake that the user can mend.
"""

import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from fedasr.cli import common
from fedasr.errors import UserError


def run() -> None:
    """Decodes, writes and prints {"out", "sentences", "users", and "wer" where there are texts}."""
    values = flags.FLAGS
    if missing := [name for name in ("checkpoint", "data", "out") if not values[name].value]:
        raise UserError(f"--{missing[0]} is missing: give --checkpoint, --data and --out")
    common.configure_devices()
    from fedasr.data.batching import make_buckets
    from fedasr.data.records import read_metadata as read_corpus_metadata
    from fedasr.training.builders.corpora import fitting_tokenizer, open_split
    from fedasr.training.builders.models import build_recogniser
    from fedasr.training.checkpoint import read_metadata, restore_params
    from fedasr.training.evaluation import MULTIPLES, Evaluator
    from fedasr.training.metrics import word_errors
    from fedasr.training.rows import local_rows
    from fedasr.training.workdir import recorded_config

    config = recorded_config(read_metadata(values.checkpoint)["config"])
    corpus = open_split(values.data, values.split, config)
    params = restore_params(values.checkpoint)
    tokenizer = fitting_tokenizer(config, read_corpus_metadata(values.data))
    layout, rows = local_rows(values.checkpoint, params, corpus, values.data)
    if rows is None and config.local.patterns:
        text = "warning: users' own parameters are not beside the checkpoint, or of other data"
        print(text, file=sys.stderr)
    # One bucket keeps the order of the sentences.
    buckets = make_buckets([corpus], 1, MULTIPLES)
    evaluator = Evaluator(
        build_recogniser(config),
        buckets,
        values.batch_size,
        tokenizer=tokenizer,
        layout=layout,
        decoder=_decoder(tokenizer),
    )
    said, found, _ = evaluator.transcripts(params, corpus, rows)
    written = Path(values.out)
    partial = written.with_name(written.name + ".part")
    try:
        partial.write_text("".join(f"{text}\n" for text in found), encoding="utf-8")
        os.replace(partial, written)
    except OSError as error:
        raise UserError(f"--out={values.out} cannot be written: {error.strerror}") from error
    told: dict[str, Any] = {"out": values.out, "split": values.split, "sentences": len(found)}
    told["users"] = len(corpus.users)
    if any(said):
        told["wer"] = word_errors(said, found).percent
    common.show(told)


def _decoder(tokenizer: Any) -> Any:
    """What the flags ask for."""
    from fedasr.decoding.beam import BeamConfig
    from fedasr.decoding.ngram import read_arpa
    from fedasr.decoding.rescoring import CausalScorer, RescoringConfig
    from fedasr.decoding.sentences import make_search, sentence_decoder
    from fedasr.text import read_lexicon

    values = flags.FLAGS
    pronunciations = read_lexicon(values.pronunciations) if values.pronunciations else None
    search = make_search(
        tokenizer,
        read_arpa(values.lm) if values.lm else None,
        pronunciations,
        BeamConfig(
            beam=values.beam,
            lm_weight=values.lm_weight,
            word_bonus=values.word_bonus,
            unknown_penalty=values.unknown_penalty,
            blank_penalty=values.blank_penalty,
        ),
    )
    scorer = CausalScorer(values.rescorer) if values.rescorer else None
    rescoring = RescoringConfig(values.nbest, values.alpha, values.acoustic_scale)
    return sentence_decoder(search, pronunciations, scorer, rescoring)


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A work directory or one checkpoint.")
    flags.DEFINE_string("data", None, "A folder written by `fedasr prepare`.")
    flags.DEFINE_string("split", "competitionHoldOut", "Which split of it.")
    flags.DEFINE_string("out", None, "Text file to write.")
    flags.DEFINE_string("lm", "", "ARPA file of words; '' for none.")
    flags.DEFINE_string("pronunciations", "", "Of words, as CMUdict; for labels of phonemes.")
    flags.DEFINE_integer("beam", 32, "Hypotheses kept after each frame.")
    flags.DEFINE_float("lm_weight", 1.0, "Times the words' log probability.")
    flags.DEFINE_float("word_bonus", 0.0, "For every word, in nats.")
    flags.DEFINE_float("unknown_penalty", 6.0, "Taken for every word that the model lacks.")
    flags.DEFINE_float("blank_penalty", 0.0, "Taken from the blank in every frame, in nats.")
    flags.DEFINE_string("rescorer", "", "A causal language model of transformers; '' for none.")
    flags.DEFINE_integer("nbest", 10, "Texts that the rescorer chooses from.")
    flags.DEFINE_float("alpha", 1.0, "The rescorer's share; the rest is the n-gram model's.")
    flags.DEFINE_float("acoustic_scale", 0.5, "With a rescorer, times the acoustic score.")
    flags.DEFINE_integer("batch_size", 32, "Utterances at a time.")


def main() -> None:
    """The command `fedasr decode`: parses the flags, runs and exits."""
    _define_flags()
    common.main(run, __name__, urls=["checkpoint"])


if __name__ == "__main__":
    main()
