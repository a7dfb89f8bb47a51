"""CTC prefix beam search with a word language model and, if wanted, a pronouncing lexicon.

The search of Hannun et al., "First-pass large vocabulary continuous speech recognition using
bi-directional recurrent DNNs" (arXiv 1408.2873): hypotheses are label sequences, each with the
probability of its alignments that end in a blank and of those that do not. What lies between two
separators is a word. Words are free: what the lexicon does not have counts as <unk> at a price,
and is written as it is spelled.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedasr.decoding.ngram import END, NGram
from fedasr.errors import UserError
from fedasr.kernels.ctc import BLANK

_NEVER = -math.inf


@dataclass(frozen=True)
class BeamConfig:
    """How hypotheses are compared and which are dropped.

    beam: hypotheses kept after each frame. lm_weight: times the log probability of the words.
    word_bonus: added for every word. unknown_penalty: taken for every word that the lexicon does
    not have, beside its probability as <unk>; it is taken as soon as no word of the lexicon begins
    like that. min_log_prob: tokens less likely than this in a frame extend no hypothesis there.
    blank_penalty: taken from the blank's log probability in every frame.
    """

    beam: int = 32
    lm_weight: float = 1.0
    word_bonus: float = 0.0
    unknown_penalty: float = 6.0
    min_log_prob: float = -7.0
    blank_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.beam < 1 or min(self.lm_weight, self.unknown_penalty, self.blank_penalty) < 0:
            raise UserError(
                "beam must be positive, lm_weight, unknown_penalty and blank_penalty not negative"
            )


class Hypothesis(NamedTuple):
    """A decoded utterance.

    text: its words. words: with what the language model knew them as ("<unk>" included) is for
    the model alone: these are as written. score: what the search maximises, acoustic +
    lm_weight x language + bonus - penalty. acoustic: natural log probability by CTC. language:
    natural log probability of the words and their end, 0 without a language model.
    """

    text: str
    words: tuple[str, ...]
    score: float
    acoustic: float
    language: float


class _Trie:
    """Spellings: what tokens may come next, and the words that are complete here."""

    __slots__ = ("children", "words")

    def __init__(self) -> None:
        self.children: dict[int, _Trie] = {}
        self.words: list[str] = []


def _trie_of(lexicon: Mapping[str, Iterable[Sequence[str]]], letters: Mapping[str, int]) -> _Trie:
    """All spellings; raises UserError for one with another token than `letters` has."""
    root = _Trie()
    for word in sorted(lexicon):
        for spelling in lexicon[word]:
            if unknown := [token for token in spelling if token not in letters]:
                raise UserError(f"the spelling of {word!r} uses {unknown}, no such tokens")
            node = root
            for token in spelling:
                node = node.children.setdefault(letters[token], _Trie())
            node.words.append(word)
    return root


class _Node:
    """A label sequence with a choice of words (homophones differ in nothing else)."""

    __slots__ = ("bonus", "children", "context", "language", "spelled", "token", "trie", "words")

    def __init__(self, token, words, spelled, trie, context, language, bonus) -> None:
        self.token: int = token
        self.words: tuple[str, ...] = words
        self.spelled: tuple[int, ...] = spelled  # of the word that has begun
        self.trie: _Trie | None = trie  # None: no word of the lexicon is spelled like this
        self.context: Any = context
        self.language: float = language
        self.bonus: float = bonus  # lm_weight x language + word bonuses - penalties
        self.children: dict[int, list[_Node]] = {}


class BeamDecoder:
    """Decodes scores of CTC.

    Args:
      tokens: what the labels 1, 2, ... are, such as the characters of a `CharTokenizer` or
        phonemes; the blank is left out.
      separator: the token between words (" ", or "SIL").
      model: of the language; None for none.
      lexicon: spellings by word, each a sequence of tokens; None for the words of the model,
        spelled letter by letter, as far as the tokens can. Homophones are told apart by the model.
      config: of the search.

    Raises:
      UserError: the separator is no token, a token comes twice, or a spelling uses another token.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        separator: str = " ",
        model: NGram | None = None,
        lexicon: Mapping[str, Iterable[Sequence[str]]] | None = None,
        config: BeamConfig | None = None,
    ) -> None:
        self._tokens = ("", *tokens)
        ids = {token: i for i, token in enumerate(tokens, start=1)}
        if separator not in ids or len(ids) != len(tokens):
            raise UserError(f"the tokens {tokens!r} must hold {separator!r}, each once")
        self._separator = ids[separator]
        self.model, self.config = model, config or BeamConfig()
        self._joint = "" if all(len(token) == 1 for token in tokens) else "-"
        self._root: _Trie | None = None
        if lexicon is None and model is not None:
            lexicon = {
                word: [tuple(word)] for word in model.vocabulary if all(c in ids for c in word)
            }
        if lexicon is not None:
            letters = {token: i for token, i in ids.items() if token != separator}
            self._root = _trie_of(lexicon, letters)

    def __call__(self, log_probs: np.ndarray) -> Hypothesis:
        """The best hypothesis; see `best`."""
        return self.best(log_probs, 1)[0]

    def best(self, log_probs: np.ndarray, count: int) -> list[Hypothesis]:
        """The best hypotheses for one utterance, at most `count`, best first.

        Args:
          log_probs: float [frames, tokens + 1], log softmax of the model's scores.

        Raises:
          ValueError: another number of tokens.
        """
        if log_probs.ndim != 2 or log_probs.shape[1] != len(self._tokens):
            raise ValueError(f"log_probs must be [frames, {len(self._tokens)}]")
        context = self.model.start if self.model else None
        root = _Node(BLANK, (), (), self._root, context, 0.0, 0.0)
        # node -> (log probability of alignments that end in a blank, of those that do not)
        beam: dict[_Node, tuple[float, float]] = {root: (0.0, _NEVER)}
        floor = self.config.min_log_prob
        for frame in np.asarray(log_probs, np.float64):
            open_tokens = [int(i) for i in np.flatnonzero(frame > floor) if i != BLANK]
            values = frame.tolist()
            blank = values[BLANK] - self.config.blank_penalty
            new: dict[_Node, list[float]] = {}
            for node, (with_blank, without) in beam.items():
                both = _add(with_blank, without)
                entry = new.setdefault(node, [_NEVER, _NEVER])
                entry[0] = _add(entry[0], both + blank)
                if node.token != BLANK:
                    entry[1] = _add(entry[1], without + values[node.token])
                for token in open_tokens:
                    # The same label again begins a new one only after a blank.
                    base = with_blank if token == node.token else both
                    if base == _NEVER:
                        continue
                    for child in self._extended(node, token):
                        entry = new.setdefault(child, [_NEVER, _NEVER])
                        entry[1] = _add(entry[1], base + values[token])
            ranked = heapq.nlargest(
                self.config.beam,
                ((_add(*pair) + node.bonus, i) for i, (node, pair) in enumerate(new.items())),
            )
            nodes = list(new)
            beam = {nodes[i]: (new[nodes[i]][0], new[nodes[i]][1]) for _, i in ranked}
        return self._ended(beam)[:count]

    def _extended(self, node: _Node, token: int) -> list[_Node]:
        """The nodes that a token leads to: several where words sound alike."""
        found = node.children.get(token)
        if found is None:
            if token == self._separator:
                found = [
                    _Node(token, words, (), self._root, context, language, bonus)
                    for words, context, language, bonus in self._closed(node)
                ]
            else:
                trie = node.trie and node.trie.children.get(token)
                fell_out = self._root is not None and node.trie is not None and trie is None
                bonus = node.bonus - self.config.unknown_penalty * fell_out
                found = [
                    _Node(
                        token,
                        node.words,
                        (*node.spelled, token),
                        trie,
                        node.context,
                        node.language,
                        bonus,
                    )
                ]
            node.children[token] = found
        return found

    def _closed(self, node: _Node) -> list[tuple[tuple[str, ...], Any, float, float]]:
        """(words, context, language, bonus) after the word that has begun, if any, ends here."""
        if not node.spelled:
            return [(node.words, node.context, node.language, node.bonus)]
        written = self._joint.join(self._tokens[i] for i in node.spelled)
        bonus = node.bonus + self.config.word_bonus
        choices = node.trie.words if node.trie is not None else []
        if not choices:
            # In the lexicon words begin like this, but none ends here: the price is still due.
            if self._root is not None and node.trie is not None:
                bonus -= self.config.unknown_penalty
            choices = [written]
        closed = []
        for word in choices:
            value, context = 0.0, None
            if self.model is not None:
                value, context = self.model.score(node.context, word)
            total = bonus + self.config.lm_weight * value
            closed.append(((*node.words, word), context, node.language + value, total))
        return closed

    def _ended(self, beam: Mapping[_Node, tuple[float, float]]) -> list[Hypothesis]:
        found: dict[tuple[str, ...], Hypothesis] = {}
        for node, pair in beam.items():
            acoustic = _add(*pair)
            for words, context, language, bonus in self._closed(node):
                if self.model is not None:
                    value, _ = self.model.score(context, END)
                    language += value
                    bonus += self.config.lm_weight * value
                score = acoustic + bonus
                # Separators at the ends, or two in a row, write the same text.
                if words not in found or score > found[words].score:
                    found[words] = Hypothesis(" ".join(words), words, score, acoustic, language)
        return sorted(found.values(), key=lambda h: (-h.score, h.words))


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))
