"""What devices accept of an edited text, span by span, and the refined label."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedasr.errors import UserError
from fedasr.feedback.corrections.edits import KINDS, Edit, Feedback
from fedasr.feedback.corrections.spans import Span, apply, changed_spans, similarity, sound
from fedasr.feedback.histograms import Histogram
from fedasr.text import CHARACTERS


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
    heard, written = feedback.hypothesis.split(), feedback.edited.split()
    spans = tuple(changed_spans(feedback.hypothesis, feedback.edited))

    def dropped(reason: str, reasons: Sequence[str] = ()) -> Review:
        return Review(None, reason, spans, tuple(reasons) or (reason,) * len(spans))

    if reason := _refusal(feedback, frames, filters):
        return dropped(reason)
    reasons = [_rejection(*_pair(feedback, span), filters, histogram) for span in spans]
    kept = [span for span, reason in zip(spans, reasons, strict=True) if not reason]
    if not kept:
        return dropped("no span left", reasons)
    words = apply(heard, [(s.start, s.stop, written[s.first : s.last]) for s in kept])
    label = " ".join(words)
    repeats = sum(a == b for a, b in itertools.pairwise(label))
    # Two more: the spaces at its ends that the paper's targets have.
    if not label or len(label) + 2 + repeats > -(-frames // filters.stride):
        return dropped("infeasible")
    return Review(label, "", spans, tuple(reasons))


def _refusal(feedback: Feedback, frames: int, filters: Filters) -> str:
    """Why a text is rejected as a whole, before its spans are looked at; "" if it is not."""
    from rapidfuzz.distance import Levenshtein

    if not set(feedback.edited) <= set(filters.characters):
        return "charset"
    if frames < filters.min_frames:
        return "too short"
    if Levenshtein.normalized_distance(feedback.hypothesis, feedback.edited) > filters.max_changed:
        return "rewritten"
    return ""


def _rejection(heard: str, written: str, filters: Filters, histogram: Histogram | None) -> str:
    """Why a span is rejected; "" if it is not."""
    if similarity(heard, written) < filters.min_similarity:
        return "similarity"
    if filters.trusted and histogram is not None:
        if any(histogram.count(key) < filters.trusted for key in trust_keys(heard, written)):
            return "untrusted"
    return ""


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
