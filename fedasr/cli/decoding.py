"""Flags that say how texts are found in scores, of the programs that decode."""

import dataclasses
from typing import Any

from absl import flags

_SETTINGS = ("lm", "lexicon", "order", "beam", "lm_weight", "word_bonus", "blank_penalty")


def define_flags() -> None:
    """--decoder, --lm, --lexicon and their numbers; None for what the run was told."""
    flags.DEFINE_string("decoder", None, "greedy, beam or lexicon; default as the run was told.")
    flags.DEFINE_string("lm", None, "ARPA file of words, or from_SPLIT of the data; '' for none.")
    flags.DEFINE_string("lexicon", None, "File, a word a line, or from_SPLIT; '' for none.")
    flags.DEFINE_integer("lm_order", None, "Words in the longest n-grams of a model from_SPLIT.")
    flags.DEFINE_float("lm_weight", None, "Times the words' log probability.")
    flags.DEFINE_float("word_bonus", None, "For every word, in nats.")
    flags.DEFINE_float("blank_penalty", None, "Taken from the blank in every frame, in nats.")
    flags.DEFINE_integer("beam", None, "Hypotheses kept after each frame.")


def settings(of_run: Any) -> Any:
    """The run's settings of decoding (`fedasr.training.config.Decoding`), with the flags' changes.

    Raises:
      UserError: a flag's value that such a setting cannot have.
    """
    from fedasr.fields import check
    from fedasr.training.config import fields

    given: dict[str, Any] = {
        name: value
        for name in _SETTINGS
        if (value := flags.FLAGS["lm_order" if name == "order" else name].value) is not None
    }
    if flags.FLAGS.decoder is not None:
        given["name"] = flags.FLAGS.decoder
    elif of_run.name == "greedy" and (given.get("lm") or given.get("lexicon")):
        given["name"] = "beam"
    if given.get("name") == "greedy":  # of which these are of no use
        given = {"lm": "", "lexicon": ""} | given
    changed = dataclasses.replace(of_run, **given)
    check({"decoding": dataclasses.asdict(changed)}, {"decoding": fields()["decoding"]})
    return changed
