"""Users' corrections: simulated edits, the filters on the device, and refined labels.

    stale recogniser -> hypotheses -> users' edits -> spans -> filters -> refined labels -> corpus

A device sees a recording, what the recogniser made of it (the hypothesis) and the edited text. It
aligns the two texts word by word; each run of changed words is a *span*, which is kept or rejected
on its own. The *refined label* is the hypothesis with the kept spans replaced: what a user left
alone stays as it was heard, and what was rejected is undone. An utterance with no kept span is not
trained on, and a user without such an utterance takes no part (arXiv 2408.10443, 2310.00141).

Nothing but `simulate_edits` and `filter_quality` knows the truth.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedasr.data import splits
from fedasr.data.corpus import Corpus, Example
from fedasr.errors import UserError
from fedasr.federated.client import Params
from fedasr.feedback.histograms import Histogram
from fedasr.streams import Stream, generator
from fedasr.text import CHARACTERS, CharTokenizer
from fedasr.training.evaluation import Evaluator

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
KINDS = ("right", "typo", "wrong word", "rewrite")

# ------------------------------------------------------------------------------- what users do


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


def transcribe(
    evaluator: Evaluator, params: Params, corpus: Corpus
) -> tuple[list[list[str]], list[list[str]]]:
    """References and hypotheses of a corpus: `[user][utterance]`, in the corpus's order.

    Args:
      evaluator: of the stale recogniser, with a single bucket: several would change the order.
      params: its parameters.
      corpus: with "features" and "labels".
    """
    references, hypotheses, _ = evaluator.transcripts(params, corpus)
    ends = np.cumsum(corpus.sizes)[:-1]

    def by_user(texts: list[str]) -> list[list[str]]:
        return [part.tolist() for part in np.split(np.asarray(texts, object), ends)]

    return by_user(references), by_user(hypotheses)


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
    sentences = sorted({text for own in references for text in own})
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
            edited = _apply(hypothesis.split(), [(e.start, e.stop, e.words) for e in planted])
            if edited != hypothesis.split():
                found.append(Feedback(user, index, hypothesis, " ".join(edited), tuple(planted)))
    return found


def _apply(words: Sequence[str], edits: Sequence[tuple[int, int, Sequence[str]]]) -> list[str]:
    """The words with the ranges start..stop-1, in ascending order, replaced."""
    out: list[str] = []
    done = 0
    for start, stop, new in edits:
        out += [*words[done:start], *new]
        done = stop
    return out + list(words[done:])


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
    for i1, i2, j1, j2 in _differences(hypothesis, reference):
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


# ------------------------------------------------------------------------- what devices can see


class Span(NamedTuple):
    """Words start..stop-1 of the hypothesis became words first..last-1 of the edited text."""

    start: int
    stop: int
    first: int
    last: int


def _differences(source: Sequence[str], target: Sequence[str]) -> list[Span]:
    """Runs of words that a least-cost alignment leaves different; there are equal ones between."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError("corrections need rapidfuzz: install it (pip install rapidfuzz)") from None
    spans: list[Span] = []
    for step in Levenshtein.opcodes(list(source), list(target)):
        if step.tag == "equal":
            continue
        i1, i2, j1, j2 = step.src_start, step.src_end, step.dest_start, step.dest_end
        if spans and (spans[-1].stop, spans[-1].last) == (i1, j1):
            spans[-1] = Span(spans[-1].start, i2, spans[-1].first, j2)
        else:
            spans.append(Span(i1, i2, j1, j2))
    return spans


def changed_spans(hypothesis: str, edited: str) -> list[Span]:
    """Where an edit changed a text, in ascending order, without overlaps.

    A run of words that were only put in, or only taken out, is widened by the word before it (at
    the start by the word after it): there is nothing to compare with otherwise.
    """
    source, target = hypothesis.split(), edited.split()
    spans: list[Span] = []
    for span in _differences(source, target):
        if span.start == span.stop or span.first == span.last:
            if span.start and span.first:
                span = Span(span.start - 1, span.stop, span.first - 1, span.last)
            elif span.stop < len(source) and span.last < len(target):
                span = Span(span.start, span.stop + 1, span.first, span.last + 1)
        if spans and (spans[-1].stop > span.start or spans[-1].last > span.first):
            before = spans.pop()
            span = Span(before.start, span.stop, before.first, span.last)
        spans.append(span)
    return spans


_SOUNDS = {
    letter: name
    for name, letters in {
        "a": "aeiouyhw",
        "b": "bfpv",
        "k": "cgjkqsxz",
        "t": "dt",
        "l": "lr",
        "n": "mn",
    }.items()
    for letter in letters
}


def sound(text: str) -> str:
    """A text by classes of letters that are easily taken for one another, runs written once."""
    folded = [_SOUNDS.get(letter, "") for letter in text]
    return "".join(a for a, b in zip(folded, ["", *folded], strict=False) if a != b)


def similarity(heard: str, written: str) -> float:
    """How alike two texts are in letters and in sound: from 0 to 1, the mean of both.

    Each is one minus the edit distance over the longer length; spaces do not count.
    """
    from rapidfuzz.distance import Levenshtein

    a, b = heard.replace(" ", ""), written.replace(" ", "")
    by_letter = Levenshtein.normalized_similarity(a, b)
    return (by_letter + Levenshtein.normalized_similarity(sound(a), sound(b))) / 2


# ------------------------------------------------------------------------------------- filters


@dataclass(frozen=True)
class Filters:
    """What a device accepts as a correction.

    Attributes:
      max_changed: edit distance of the two texts in letters over the longer length; beyond it the
        text was rewritten, not corrected.
      min_similarity: of a span's heard and written text (see `similarity`).
      min_frames: of the recording; shorter ones hold no sentence.
      stride: input frames per output frame of the recogniser: the label must be CTC-feasible.
      characters: the alphabet.
      trusted: clients from which on a correction is trusted (see `trust_keys`); 0 trusts all.

    Raises:
      UserError: a bound out of range.
    """

    max_changed: float = 0.5
    min_similarity: float = 0.4
    min_frames: int = 50
    stride: int = 3
    characters: str = CHARACTERS
    trusted: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.max_changed <= 1 and 0 <= self.min_similarity <= 1):
            raise UserError("max_changed and min_similarity must lie between 0 and 1")
        if self.min_frames < 0 or self.stride < 1 or not self.trusted >= 0:
            raise UserError("min_frames and trusted must be 0 or more, stride at least 1")


class Review(NamedTuple):
    """What became of an edited utterance.

    label: the refined text, None where it is not trained on. reason: why not ("" with a label):
    "charset", "too short", "rewritten", "no span left" or "infeasible". spans, reasons: the changed
    spans and why each was rejected: "" if it was not, "similarity", "untrusted", or the text's
    reason where it was rejected as a whole.
    """

    label: str | None
    reason: str
    spans: tuple[Span, ...]
    reasons: tuple[str, ...]


def trust_keys(heard: str, written: str) -> list[str]:
    """What a span asks other clients to confirm: correction pairs, one for every word written.

    A pair is the first sound of what was heard and the word that replaced it: no two devices hear a
    word that the recogniser does not know in quite the same letters. Words stand for one another in
    their order where there are as many, and else for the whole span.
    """
    old, new = heard.split(), written.split()
    if len(old) != len(new):
        old = [heard] * len(new)
    return [f"{sound(a)[:1]}>{b}" for a, b in zip(old, new, strict=True)]


def _pair(feedback: Feedback, span: Span) -> tuple[str, str]:
    """The heard and the written text of a span."""
    heard, written = feedback.hypothesis.split(), feedback.edited.split()
    return " ".join(heard[span.start : span.stop]), " ".join(written[span.first : span.last])


def pairs_of_users(
    feedback: Sequence[Feedback], frames: Sequence[int], users: int, filters: Filters
) -> list[set[str]]:
    """The `trust_keys` that each user reports, by user: of spans that nothing else rejects.

    Args:
      feedback: of all users.
      frames: length of each one's features.
      users: how many there are.
      filters: of the devices; what they reject by looking at their own data is not reported.
    """
    keys: list[set[str]] = [set() for _ in range(users)]
    for one, length in zip(feedback, frames, strict=True):
        reviewed = review(one, length, filters)
        for span, reason in zip(reviewed.spans, reviewed.reasons, strict=True):
            if not reason:
                keys[one.user].update(trust_keys(*_pair(one, span)))
    return keys


def review(
    feedback: Feedback, frames: int, filters: Filters, histogram: Histogram | None = None
) -> Review:
    """Filters an edited utterance span by span and refines its label.

    Args:
      feedback: what the device holds; `planted` is not looked at.
      frames: length of the recording's features.
      filters: what is accepted.
      histogram: of clients by `trust_keys`; None trusts all.
    """
    from rapidfuzz.distance import Levenshtein

    heard, written = feedback.hypothesis.split(), feedback.edited.split()
    spans = tuple(changed_spans(feedback.hypothesis, feedback.edited))

    def dropped(reason: str, reasons: Sequence[str] = ()) -> Review:
        return Review(None, reason, spans, tuple(reasons) or (reason,) * len(spans))

    if not set(feedback.edited) <= set(filters.characters):
        return dropped("charset")
    if frames < filters.min_frames:
        return dropped("too short")
    if Levenshtein.normalized_distance(feedback.hypothesis, feedback.edited) > filters.max_changed:
        return dropped("rewritten")
    reasons = []
    for span in spans:
        pair = _pair(feedback, span)
        reason = ""
        if similarity(*pair) < filters.min_similarity:
            reason = "similarity"
        elif filters.trusted and histogram is not None:
            if any(histogram.count(key) < filters.trusted for key in trust_keys(*pair)):
                reason = "untrusted"
        reasons.append(reason)
    kept = [span for span, reason in zip(spans, reasons, strict=True) if not reason]
    if not kept:
        return dropped("no span left", reasons)
    words = _apply(heard, [(s.start, s.stop, written[s.first : s.last]) for s in kept])
    label = " ".join(words)
    repeats = sum(a == b for a, b in itertools.pairwise(label))
    # Two more: the spaces at its ends that the paper's targets have.
    if not label or len(label) + 2 + repeats > -(-frames // filters.stride):
        return dropped("infeasible")
    return Review(label, "", spans, tuple(reasons))


def filter_quality(
    feedback: Sequence[Feedback], reviews: Sequence[Review]
) -> dict[str, dict[str, int]]:
    """How many planted edits the filters kept, by kind: {kind: {"edits", "kept"}}.

    An edit counts as kept if every changed span that touches it was kept, and a rewritten text if
    anything of it was.
    """
    edits: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for one, reviewed in zip(feedback, reviews, strict=True):
        judged = list(zip(reviewed.spans, reviewed.reasons, strict=True))
        for edit in one.planted:
            edits[edit.kind] += 1
            if edit.kind == "rewrite":
                kept[edit.kind] += reviewed.label is not None
                continue
            reasons = [reason for span, reason in judged if _touches(span, edit)]
            kept[edit.kind] += reviewed.label is not None and bool(reasons) and not any(reasons)
    return {kind: {"edits": edits[kind], "kept": kept[kind]} for kind in KINDS}


def _touches(span: Span, edit: Edit) -> bool:
    if edit.start == edit.stop:
        return span.start <= edit.start <= span.stop
    return span.start < edit.stop and edit.start < span.stop


# ------------------------------------------------------------------------------ derived corpora


class RelabelledCorpus:
    """Some utterances of a corpus with other labels.

    Args:
      corpus: where the utterances are.
      labels: {(user, index): int32 [labels]}, by the corpus's numbers.
      everybody: whether users who have none of them are kept, without examples (who must not be in
        a cohort then: see `fedasr.data.sampling.SilentSampler`), or left out.

    Raises:
      UserError: no label at all, or one of an utterance that is not there.
    """

    def __init__(
        self,
        corpus: Corpus,
        labels: Mapping[tuple[int, int], np.ndarray],
        everybody: bool = False,
    ) -> None:
        if not labels:
            raise UserError("no utterance is left: nobody's corrections passed the filters")
        self._corpus = corpus
        rows: dict[int, list[tuple[int, np.ndarray]]] = {}
        if everybody:
            rows = {user: [] for user in range(len(corpus.users))}
        for user, index in sorted(labels):
            if not (0 <= user < len(corpus.users) and 0 <= index < corpus.sizes[user]):
                raise UserError(f"the corpus has no utterance {index} of user {user}")
            labelled = (index, np.asarray(labels[user, index], np.int32))
            rows.setdefault(user, []).append(labelled)
        self._rows = list(rows.values())
        self._owners = np.asarray(list(rows), np.int64)
        self.sizes = np.asarray([len(rows) for rows in self._rows], np.int64)

    @property
    def users(self) -> Sequence[str]:
        """User ids, sorted."""
        return splits.LazyUsers(len(self._rows), lambda i: self._corpus.users[int(self._owners[i])])

    @property
    def owners(self) -> np.ndarray:
        """The users' numbers in the corpus, int64 [users]."""
        return self._owners

    def _of(self, user: int) -> list[tuple[int, np.ndarray]]:
        if not 0 <= user < len(self._rows):
            raise IndexError(f"user {user} is not in [0, {len(self._rows)})")
        return self._rows[user]

    def lengths(self, user: int) -> Mapping[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        rows = self._of(user)
        kept = [index for index, _ in rows]
        lengths = self._corpus.lengths(int(self._owners[user]))
        out = {name: np.asarray(values)[np.asarray(kept, int)] for name, values in lengths.items()}
        return out | {"labels": np.asarray([len(labels) for _, labels in rows], np.int32)}

    def get(self, user: int, indices: Sequence[int]) -> list[Example]:
        """See `fedasr.data.corpus.Corpus`."""
        rows = self._of(user)
        if not all(0 <= i < len(rows) for i in indices):
            raise IndexError(f"examples {list(indices)} are not in [0, {len(rows)})")
        examples = self._corpus.get(int(self._owners[user]), [rows[i][0] for i in indices])
        return [
            {**example, "labels": rows[i][1]} for example, i in zip(examples, indices, strict=True)
        ]


def corrected_corpus(
    corpus: Corpus,
    feedback: Sequence[Feedback],
    texts: Sequence[str | None],
    tokenizer: CharTokenizer,
    pad_space: bool = True,
    everybody: bool = False,
) -> RelabelledCorpus:
    """The users' corrected utterances as a corpus of their own.

    Args:
      corpus: that the feedback is about.
      feedback: edited utterances.
      texts: what is trained on for each of them, such as `Review.label`; None for nothing.
      tokenizer: of the corpus. pad_space: as it was prepared.
      everybody: whether users who have none left are kept, see `RelabelledCorpus`.

    Raises:
      UserError: nothing is left, or a text outside the alphabet.
    """
    labels = {
        (one.user, one.index): tokenizer.encode(text, pad_space)
        for one, text in zip(feedback, texts, strict=True)
        if text is not None
    }
    return RelabelledCorpus(corpus, labels, everybody)
