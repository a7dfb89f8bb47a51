"""Alphabets that are learned from texts."""

from collections import Counter
from collections.abc import Iterable

from fedasr.errors import UserError
from fedasr.text.normalize import normalise


def alphabet_of(texts: Iterable[str], language: str = "en", min_count: int = 1) -> str:
    """The letters, marks, apostrophe and hyphen of normalised texts, in Unicode's order; and space.

    It tells which letters occur at all: a vocabulary that was learned from the texts, and that no
    privacy guarantee covers.

    Args:
      texts: of all splits that will be prepared; their order does not matter.
      language: of the normalisation.
      min_count: characters that occur less often are left out.

    Raises:
      UserError: no letter at all.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalise(text, language, None).text)
    kept = sorted(c for c, n in counts.items() if n >= max(min_count, 1) and c != " ")
    if not any(map(str.isalpha, kept)):
        raise UserError("the transcripts have no letters to make an alphabet of: mend the source")
    return " " + "".join(kept)
