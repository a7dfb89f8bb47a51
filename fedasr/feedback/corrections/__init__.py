"""Users' corrections: simulated edits, the filters on the device, and refined labels.

    stale recogniser -> hypotheses -> users' edits -> spans -> filters -> refined labels -> corpus

A device sees a recording, what the recogniser made of it (the hypothesis) and the edited text. It
aligns the two texts word by word; each run of changed words is a *span*, which is kept or rejected
on its own. The *refined label* is the hypothesis with the kept spans replaced: what a user left
alone stays as it was heard, and what was rejected is undone. An utterance with no kept span is not
trained on, and a user without such an utterance takes no part (arXiv 2408.10443, 2310.00141).

Nothing but `simulate_edits` and `filter_quality` knows the truth.
"""

from fedasr.feedback.corrections.corpora import RelabelledCorpus, corrected_corpus, transcribe
from fedasr.feedback.corrections.edits import KINDS, Edit, EditConfig, Feedback, simulate_edits
from fedasr.feedback.corrections.filters import (
    Filters,
    Review,
    filter_quality,
    pairs_of_users,
    review,
    trust_keys,
)
from fedasr.feedback.corrections.spans import Span, changed_spans, similarity, sound

__all__ = [
    "KINDS",
    "Edit",
    "EditConfig",
    "Feedback",
    "Filters",
    "RelabelledCorpus",
    "Review",
    "Span",
    "changed_spans",
    "corrected_corpus",
    "filter_quality",
    "pairs_of_users",
    "review",
    "similarity",
    "simulate_edits",
    "sound",
    "transcribe",
    "trust_keys",
]
