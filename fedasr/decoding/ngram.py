"""Word n-gram language models: modified Kneser-Ney estimates, in ARPA files that KenLM reads.

Estimates are those of Chen and Goodman, "An empirical study of smoothing techniques for language
modeling" (1999), interpolated, in the form of Heafield et al., "Scalable modified Kneser-Ney
language model estimation" (ACL 2013): unigrams are interpolated with the uniform distribution over
the words, the end of a sentence and <unk>, so that words that were never seen have a probability.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedasr.errors import UserError

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
# For orders with too few n-grams to estimate discounts from (as `lmplz --discount_fallback`).
_FALLBACK = (0.5, 1.0, 1.5)
_LN10 = math.log(10.0)

Gram = tuple[str, ...]


class NGram:
    """A back-off model.

    Args:
      order: of its longest n-grams.
      grams: log10 probability and log10 back-off weight by n-gram, as an ARPA file has them: for
        every n-gram of two words or more, its words but the last are there, too.

    Raises:
      UserError: no unigram, or an n-gram that is too long.
    """

    def __init__(self, order: int, grams: Mapping[Gram, tuple[float, float]]) -> None:
        if not 1 <= max(map(len, grams), default=0) <= order:
            raise UserError(
                f"a language model of order {order} needs n-grams of 1 to {order} words"
            )
        self.order = order
        self.grams = dict(grams)
        # A model made elsewhere may be closed: what is unknown is then nearly impossible.
        self.grams.setdefault((UNKNOWN,), (-100.0, 0.0))
        self.vocabulary = frozenset(
            g[0] for g in self.grams if len(g) == 1 and g[0] not in (BEGIN, END, UNKNOWN)
        )

    @property
    def start(self) -> Gram:
        """The context of a sentence's first word."""
        return (BEGIN,)[: self.order - 1]

    def score(self, context: Gram, word: str) -> tuple[float, Gram]:
        """How likely a word is.

        Args:
          context: `start`, or what an earlier call returned.
          word: any; one outside of the vocabulary counts as <unk>. `END` ends the sentence.

        Returns:
          Its natural log probability, and the context of the next word.
        """
        if (word,) not in self.grams:
            word = UNKNOWN
        backoff, rest = 0.0, context
        while (entry := self.grams.get((*rest, word))) is None:
            backoff += self.grams.get(rest, (0.0, 0.0))[1]
            rest = rest[1:]
        following = (*context, word)
        # The longest context that the model knows anything of; a longer one makes no difference.
        following = following[max(0, len(following) - self.order + 1) :]
        while following and following not in self.grams:
            following = following[1:]
        return (entry[0] + backoff) * _LN10, following

    def sentence(self, text: str) -> float:
        """Natural log probability of a sentence and of its end; white space separates words."""
        total, context = 0.0, self.start
        for word in [*text.split(), END]:
            value, context = self.score(context, word)
            total += value
        return total

    def perplexity(self, texts: Iterable[str]) -> float:
        """Of sentences, by word and end of sentence."""
        texts = list(texts)
        tokens = sum(len(text.split()) + 1 for text in texts)
        return math.exp(-sum(map(self.sentence, texts)) / max(tokens, 1))


def estimate(
    texts: Iterable[str], order: int = 3, vocabulary: Iterable[str] | None = None
) -> NGram:
    """Interpolated modified Kneser-Ney estimates from sentences.

    Args:
      texts: sentences; white space separates words.
      order: of the longest n-grams, at least 1.
      vocabulary: words that the model knows; others of the texts count as <unk>, and words that no
        text has get the share of an unseen word. None for all words of the texts.

    Raises:
      UserError: no text, an order below 1, or a text that holds <s>, </s> or <unk>.
    """
    if order < 1:
        raise UserError(f"the order of a language model must be at least 1, not {order}")
    known = None if vocabulary is None else set(vocabulary)
    raw = _raw_counts(texts, order, known)
    words = {g[0] for g in raw[0]} - {BEGIN} | {END, UNKNOWN} | (known or set())
    probability: dict[Gram, float] = {}
    weight: dict[Gram, float] = {}
    for n, of_order in enumerate(_continuations(raw), start=1):
        discounts = _discounts(of_order)
        total, weights = _contexts(of_order, discounts)
        weight |= weights
        if n == 1:
            for word in words:
                count = of_order[(word,)]
                own = max(count - discounts[min(count, 3) - 1], 0.0) if count else 0.0
                probability[(word,)] = own / total[()] + weight[()] / len(words)
            continue
        for gram, count in of_order.items():
            own = (count - discounts[min(count, 3) - 1]) / total[gram[:-1]]
            probability[gram] = own + weight[gram[:-1]] * probability[gram[1:]]
    grams = {
        gram: (math.log10(p), math.log10(weight[gram]) if gram in weight else 0.0)
        for gram, p in probability.items()
    }
    if order > 1:
        grams[(BEGIN,)] = (-99.0, math.log10(weight[(BEGIN,)]))
    return NGram(order, grams)


def _raw_counts(texts: Iterable[str], order: int, known: set[str] | None) -> list[Counter[Gram]]:
    """How often each n-gram is in the texts, for n from 1 to the order."""
    raw: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for text in texts:
        words = text.split()
        if special := {BEGIN, END, UNKNOWN} & set(words):
            raise UserError(f"a text holds {sorted(special)}, which mean something else")
        words = [w if known is None or w in known else UNKNOWN for w in words]
        words = [BEGIN, *words, END]
        for n in range(1, order + 1):
            raw[n - 1].update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not raw[0]:
        raise UserError("a language model needs at least one sentence")
    return raw


def _continuations(raw: Sequence[Counter[Gram]]) -> list[Counter[Gram]]:
    """Shorter n-grams count the words seen before them, except where nothing can stand before."""
    counts = list(raw)
    for n in range(len(raw) - 1, 0, -1):
        before = Counter(gram[1:] for gram in raw[n])
        counts[n - 1] = Counter(
            {g: c if g[0] == BEGIN else before[g] for g, c in raw[n - 1].items() if g != (BEGIN,)}
        )
    if len(raw) == 1:
        del counts[0][(BEGIN,)]
    return counts


def _contexts(
    counts: Counter[Gram], discounts: tuple[float, float, float]
) -> tuple[dict[Gram, int], dict[Gram, float]]:
    """Of each context: how many words follow, and the share that is left for shorter n-grams."""
    total: dict[Gram, int] = defaultdict(int)
    kept: dict[Gram, float] = defaultdict(float)
    for gram, count in counts.items():
        total[gram[:-1]] += count
        kept[gram[:-1]] += discounts[min(count, 3) - 1] if count else 0.0
    return total, {context: kept[context] / total[context] for context in total}


def _discounts(counts: Counter[Gram]) -> tuple[float, float, float]:
    """What is taken from n-grams counted once, twice, and more often."""
    n1, n2, n3, n4 = (sum(c == k for c in counts.values()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return _FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    # Within (0, count]: nothing negative is left, and something for unseen words.
    if all(0 < d <= count for d, count in zip(found, (1, 2, 3), strict=True)):
        return found
    return _FALLBACK


def write_arpa(model: NGram, path: str | os.PathLike[str]) -> None:
    """Writes a model as ARPA text: log10 probabilities, n-grams sorted, as KenLM reads it."""
    orders: list[list[Gram]] = [[] for _ in range(model.order)]
    for gram in sorted(model.grams):
        orders[len(gram) - 1].append(gram)
    lines = ["\\data\\"]
    lines += [f"ngram {n}={len(grams)}" for n, grams in enumerate(orders, start=1)]
    for n, grams in enumerate(orders, start=1):
        lines += ["", f"\\{n}-grams:"]
        for gram in grams:
            p, backoff = model.grams[gram]
            tail = f"\t{backoff:.9g}" if n < model.order else ""
            lines.append(f"{p:.9g}\t{' '.join(gram)}{tail}")
    Path(path).write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")


def read_arpa(path: str | os.PathLike[str]) -> NGram:
    """Reads an ARPA file.

    Raises:
      UserError: the file cannot be read, is no ARPA file, or has other numbers of n-grams than it
        says.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    arpa = _Arpa()
    for number, line in enumerate(map(str.strip, lines), start=1):
        try:
            arpa.add(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not ARPA ({error})") from error
    said, found = arpa.said, dict(arpa.found)
    if not (arpa.ended and said) or found != {k: v for k, v in said.items() if v}:
        raise UserError(f"{path} is no whole ARPA file: it says {said}, it holds {found}")
    return NGram(max(said), arpa.grams)


class _Arpa:
    """What the lines of an ARPA file say so far.

    said, found: n-grams by order, as the head has them and as they came. grams: see `NGram`.
    """

    def __init__(self) -> None:
        self.said: dict[int, int] = {}
        self.found: Counter[int] = Counter()
        self.grams: dict[Gram, tuple[float, float]] = {}
        self.ended = False
        self._order = 0

    def add(self, line: str) -> None:
        """Raises ValueError for a line that does not belong there."""
        if self.ended or not line or line == "\\data\\":
            return
        if line == "\\end\\":
            self.ended = True
        elif line.startswith("ngram ") and not self._order:
            order, count = line[6:].split("=")
            self.said[int(order)] = int(count)
        elif line.startswith("\\") and line.endswith("-grams:"):
            self._order = int(line[1:-7])
        else:
            self._add_gram(line)

    def _add_gram(self, line: str) -> None:
        if not (n := self._order):
            raise ValueError("text before the first n-grams")
        p, *rest = line.split()
        if len(rest) not in (n, n + 1):
            raise ValueError(f"not a {n}-gram")
        self.grams[tuple(rest[:n])] = float(p), float(rest[n]) if len(rest) > n else 0.0
        self.found[n] += 1
