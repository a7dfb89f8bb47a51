"""From scores to sentences: a search, of characters or of phonemes, and a judge of its n best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from fedasr.decoding.beam import BeamConfig, BeamDecoder
from fedasr.decoding.language import characters_of, spellings
from fedasr.decoding.ngram import NGram
from fedasr.decoding.rescoring import RescoringConfig, TextScorer, rescore
from fedasr.errors import UserError
from fedasr.text import SILENCE, PhonemeTokenizer, Tokenizer

_NEVER = 1e6  # nats: more than any utterance's scores
Pronunciations = Mapping[str, Iterable[tuple[str, ...]]]


def make_search(
    tokenizer: Tokenizer,
    model: NGram | None = None,
    pronunciations: Pronunciations | None = None,
    config: BeamConfig | None = None,
) -> BeamDecoder:
    """A beam search that writes words.

    Args:
      tokenizer: of the labels, characters or phonemes.
      model: of the language; None for none.
      pronunciations: of words, for phonemes; only those of the model's words are taken, if there is
        one. No other word is written.
      config: of the search.

    Raises:
      UserError: phonemes without pronunciations, pronunciations for characters, or no word left.
    """
    config = config or BeamConfig()
    if not isinstance(tokenizer, PhonemeTokenizer):
        if pronunciations is not None:
            raise UserError("the labels are no phonemes: leave the pronunciations out")
        tokens = characters_of(tokenizer)
        lexicon = None if model is None else spellings(model.vocabulary, tokenizer)
        return BeamDecoder(tokens, " ", model, lexicon, config)
    if pronunciations is None:
        raise UserError("labels are phonemes: give pronunciations of words, such as CMUdict")
    known = {
        word: list(spelled)
        for word, spelled in pronunciations.items()
        if model is None or word in model.vocabulary
    }
    if not known:
        raise UserError("none of the language model's words has a pronunciation")
    closed = dataclasses.replace(config, unknown_penalty=_NEVER)
    return BeamDecoder(tokenizer.characters, SILENCE, model, known, closed)


def sentence_decoder(
    search: BeamDecoder,
    pronunciations: Pronunciations | None = None,
    scorer: TextScorer | None = None,
    config: RescoringConfig | None = None,
) -> Callable[[np.ndarray], str]:
    """From log probabilities [frames, vocab] to a sentence, as `Evaluator` takes it.

    Args:
      search: of `make_search`. pronunciations: that it was made with: what is no word of them, such
        as the beginning of one at the end, is left out.
      scorer: of a causal language model, which chooses among the n best; None for the best.
      config: of that choice.
    """
    config = config or RescoringConfig()

    def decode(log_probs: np.ndarray) -> str:
        found = search.best(log_probs, config.nbest if scorer is not None else 1)
        if pronunciations is not None:
            found = [
                h._replace(text=" ".join(word for word in h.words if word in pronunciations))
                for h in found
            ]
        if scorer is None:
            return found[0].text
        return rescore(found, scorer, config).text

    return decode
