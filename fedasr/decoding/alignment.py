"""When each word of a text was said: the likeliest CTC alignment of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedasr.errors import UserError
from fedasr.kernels.ctc import BLANK
from fedasr.text import Tokenizer


class Word(NamedTuple):
    """A word, and the seconds at which it begins and ends; None where nobody knows."""

    word: str
    start: float | None
    end: float | None


def align(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """The frames of each label on the likeliest path (Viterbi over the states of CTC).

    Args:
      log_probs: float [frames, vocab]. labels: int [labels], without blanks.

    Returns:
      int [labels, 2], first and last frame of each; None where the labels do not fit the frames.
    """
    states = np.full(2 * len(labels) + 1, BLANK)
    states[1::2] = labels
    frames, count = len(log_probs), len(states)
    if not len(labels) or not frames:
        return np.zeros((0, 2), np.int64) if not len(labels) else None
    skips = np.zeros(count, bool)  # a label may follow another one without a blank between
    skips[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(count, -np.inf)
    score[:2] = log_probs[0, states[:2]]
    back = np.zeros((frames, count), np.int8)
    for t in range(1, frames):
        stay, step = score, np.concatenate([[-np.inf], score[:-1]])
        jump = np.where(skips, np.concatenate([[-np.inf, -np.inf], score[:-2]]), -np.inf)
        choices = np.stack([stay, step, jump])
        back[t] = np.argmax(choices, axis=0)
        score = choices.max(axis=0) + log_probs[t, states]
    state = count - 1 if score[-1] >= score[-2] else count - 2
    if not np.isfinite(score[state]):
        return None
    path = np.zeros(frames, np.int64)
    for t in range(frames - 1, -1, -1):
        path[t] = state
        state -= back[t, state]
    places = [np.flatnonzero(path == 2 * i + 1) for i in range(len(labels))]
    return np.array([[found[0], found[-1]] for found in places])


def words_of(
    text: str, log_probs: np.ndarray, tokenizer: Tokenizer, seconds: float, start: float = 0.0
) -> list[Word]:
    """The words of a text with their times.

    CTC is sure of a token for a frame or two, so that words seem shorter than they are: their
    beginnings are more to be trusted than their ends.

    Args:
      text: that was decoded, words with a space between.
      log_probs: float [frames, vocab], of which it was decoded. tokenizer: of their tokens.
      seconds: of a frame. start: of the first one.

    Returns:
      The words in order; without times where the text has no alignment.
    """
    words = text.split()
    try:
        labels = np.asarray(tokenizer.encode(text)) if words else np.zeros(0, np.int64)
    except UserError:
        labels = None
    spans = None if labels is None else align(log_probs, labels)
    if spans is None or labels is None:
        return [Word(word, None, None) for word in words]
    of_word: dict[int, list[np.ndarray]] = {}
    for i, span in enumerate(spans):
        if tokenizer.decode(labels[i : i + 1]):  # silence between words belongs to none
            number = len(tokenizer.decode(labels[: i + 1]).split()) - 1
            of_word.setdefault(number, []).append(span)
    return [
        Word(
            word,
            round(start + seconds * float(of_word[i][0][0]), 3),
            round(start + seconds * float(of_word[i][-1][1] + 1), 3),
        )
        if i in of_word
        else Word(word, None, None)
        for i, word in enumerate(words)
    ]
