"""What users do to hypotheses, simulated: corrections, some of them wrong, and rewrites."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedasr.errors import UserError
from fedasr.feedback.corrections.spans import apply, differences
from fedasr.streams import Stream, generator

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
KINDS = ("right", "typo", "wrong word", "rewrite")


@dataclass(frozen=True)
class EditConfig:
    """How the simulated users edit; shares in [0, 1].

    Attributes:
      active: share of the users who correct anything at all.
      corrected: share of the errors (runs of wrong words) that an active user corrects.
      typos: share of those corrections with a slip of the finger: one letter left out, doubled,
        replaced, or swapped with the next.
      wrong_words: share of those corrections in which one word is another word of the language.
      rewritten: share of the utterances of an active user that are replaced by something else
        altogether, which was not said.

    Raises:
      UserError: a share out of range.
    """

    active: float = 0.9
    corrected: float = 0.8
    typos: float = 0.08
    wrong_words: float = 0.08
    rewritten: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.active, self.corrected, self.typos, self.wrong_words, self.rewritten)
        if not all(0 <= share <= 1 for share in shares) or self.typos + self.wrong_words > 1:
            raise UserError(f"the shares of edits must lie between 0 and 1: {self}")


class Edit(NamedTuple):
    """What a simulated user did to words start..stop-1 of a hypothesis, and of which of `KINDS`."""

    start: int
    stop: int
    words: tuple[str, ...]
    kind: str


class Feedback(NamedTuple):
    """An edited utterance: user and index in the corpus, both texts, and the hidden truth."""

    user: int
    index: int  # type: ignore[assignment]  # hides `tuple.index`
    hypothesis: str
    edited: str
    planted: tuple[Edit, ...]


def simulate_edits(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[Sequence[str]],
    config: EditConfig,
    seed: int,
) -> list[Feedback]:
    """Edited utterances of simulated users; only those whose text was changed.

    What a user does to an utterance is a function of (seed, user, utterance), of the texts, and of
    the texts of all (which rewrites and wrong words are taken from).

    Args:
      references: what was said, `[user][utterance]`.
      hypotheses: what the recogniser heard, the same way.
      config: how users edit.
      seed: 0 or more.

    Raises:
      UserError: references and hypotheses of different numbers of utterances.
    """
    if [len(r) for r in references] != [len(h) for h in hypotheses]:
        raise UserError("there must be one hypothesis for every reference")
    sentences = sorted({text for said in references for text in said})
    words = sorted({word for text in sentences for word in text.split()})
    found = []
    for user, (said, heard) in enumerate(zip(references, hypotheses, strict=True)):
        if generator(Stream.CORRECTIONS, "active", seed, user).random() >= config.active:
            continue
        for index, (reference, hypothesis) in enumerate(zip(said, heard, strict=True)):
            rng = generator(Stream.CORRECTIONS, "edit", seed, user, index)
            if rng.random() < config.rewritten:
                planted = _rewrite(reference, hypothesis, sentences, rng)
            else:
                planted = _fixes(reference.split(), hypothesis.split(), words, config, rng)
            edited = apply(hypothesis.split(), [(e.start, e.stop, e.words) for e in planted])
            if edited != hypothesis.split():
                found.append(Feedback(user, index, hypothesis, " ".join(edited), tuple(planted)))
    return found


def _rewrite(
    reference: str, hypothesis: str, sentences: Sequence[str], rng: np.random.Generator
) -> list[Edit]:
    others = [text for text in sentences if text not in (reference, hypothesis)]
    if not others:
        return []
    text = others[rng.integers(len(others))]
    return [Edit(0, len(hypothesis.split()), tuple(text.split()), "rewrite")]


def _fixes(
    reference: Sequence[str],
    hypothesis: Sequence[str],
    words: Sequence[str],
    config: EditConfig,
    rng: np.random.Generator,
) -> list[Edit]:
    """What a user corrects of a hypothesis, some of it wrongly."""
    edits = []
    for i1, i2, j1, j2 in differences(hypothesis, reference):
        chance, slip = rng.random(2)
        if chance >= config.corrected:
            continue
        new, kind = list(reference[j1:j2]), "right"
        if new and slip < config.typos:
            at = int(rng.integers(len(new)))
            new[at], kind = _typo(new[at], words, rng), "typo"
        elif new and slip < config.typos + config.wrong_words and len(words) > 1:
            at = int(rng.integers(len(new)))
            others = [word for word in words if word != new[at]]
            new[at], kind = others[rng.integers(len(others))], "wrong word"
        if new != list(hypothesis[i1:i2]):  # a slip may hit upon what was heard
            edits.append(Edit(i1, i2, tuple(new), kind))
    return edits


def _typo(word: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """The word with one slip of the finger, never another word of the language."""
    known = {*words, word, ""}
    while True:
        at, how = int(rng.integers(len(word))), int(rng.integers(4))
        letter = _LETTERS[rng.integers(len(_LETTERS))]
        swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
        slips = (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + letter + word[at + 1 :],
            swapped,
        )
        if slips[how] not in known:
            return slips[how]
