import itertools

import numpy as np
import pytest

from fedasr.decoding.alignment import Word, align, words_of
from fedasr.text import CharTokenizer
from fedasr.text.subtitles import srt


def log_probs(frames, vocab, seed):
    scores = np.random.default_rng(seed).normal(size=(frames, vocab)) * 2
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def by_hand(scores, labels):
    """The best of all paths that collapse to the labels, one by one."""
    best, found = -np.inf, None
    for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        first = [i for i in range(len(path)) if i == 0 or path[i] != path[i - 1]]
        if [path[i] for i in first if path[i]] != list(labels):
            continue
        value = sum(scores[t, token] for t, token in enumerate(path))
        if value > best:
            best, found = value, path
    if found is None:
        return None
    runs = [
        (token, list(run)) for token, run in itertools.groupby(range(len(found)), found.__getitem__)
    ]
    return [[run[0], run[-1]] for token, run in runs if token]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("labels", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 1], [1, 1, 1, 1]])
def test_the_alignment_is_the_best_of_all_paths(labels, seed):
    scores = log_probs(6, 3, seed)
    found = align(scores, np.asarray(labels))
    expected = by_hand(scores, labels)
    assert (found is None) == (expected is None)  # four in a row take seven frames
    if found is not None:
        assert found.tolist() == expected


def test_nothing_was_said():
    assert align(log_probs(3, 3, 0), np.zeros(0, int)).shape == (0, 2)
    assert align(np.zeros((0, 3)), np.asarray([1])) is None
    assert words_of("", log_probs(3, 3, 0), CharTokenizer("a "), 0.1) == []


def spelled(text, tokenizer):
    """Sure of each character for a frame, with two blanks after each."""
    ids = tokenizer.encode(text)
    scores = np.full((3 * len(ids), tokenizer.vocab_size), -20.0)
    scores[:, 0] = 0.0
    scores[3 * np.arange(len(ids)), ids] = 5.0
    return scores


def test_words_have_the_times_of_their_characters():
    tokenizer = CharTokenizer("ab ")
    scores = spelled("ab b aa", tokenizer)
    found = words_of("ab b aa", scores, tokenizer, 0.1, 2.0)
    assert found == [Word("ab", 2.0, 2.4), Word("b", 2.9, 3.0), Word("aa", 3.5, 3.9)]
    # A text that the tokens cannot write, or that does not fit, has words without times.
    assert words_of("cd b", scores, tokenizer, 0.1) == [
        Word("cd", None, None),
        Word("b", None, None),
    ]
    assert words_of("ab", scores[:1], tokenizer, 0.1) == [Word("ab", None, None)]


def test_subtitles():
    words = [Word("one", 0.0, 0.5), Word("two", 0.6, 1.0), Word("late", 62.0, 3723.4567)]
    text = srt([*words, Word("nowhere", None, None)])
    assert text == (
        "1\n00:00:00,000 --> 00:00:01,000\none two\n\n2\n00:01:02,000 --> 01:02:03,457\nlate\n\n"
    )
    many = [Word("word", 0.5 * i, 0.5 * i + 0.4) for i in range(40)]
    lines = srt(many).split("\n")[2::4]
    assert sum(len(line.split()) for line in lines) == 40
    assert all(len(line) <= 42 for line in lines) and len(lines) > 4
