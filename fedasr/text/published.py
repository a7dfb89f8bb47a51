"""Transcripts as the public programs of arXiv 2310.00098 write them.

Their labels leave out what cannot be written, where `fedasr.text.normalise` skips the utterance and
says so. For whoever compares word error rates with theirs.
"""

import string

from fedasr.text.alphabets import CHARACTERS, alphabet

_REMOVED = frozenset(string.punctuation) - {"'", "-"}
_KEPT = frozenset(c for language in ("en", "de", "fr") for c in alphabet(language, True))
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz ")
_APOSTROPHE = "\u2019"


def published_text(text: str) -> str:
    """A transcript in a-z, space, apostrophe and hyphen, by the published rules.

    In lower case, character by character: punctuation, digits and signs are left out, so that what
    they separate becomes one word; letters are transliterated, those of any script, but for such
    as would become more than letters; a typographic apostrophe stays between letters. Then hyphens
    beside a space go, and spaces are single.

    Transliteration is anyascii's, which agrees with theirs (Unidecode) on Latin letters alone.

    Args:
      text: any text.

    Returns:
      The text, "" if nothing of it can be written; without spaces at its ends.
    """
    lowered = text.lower()
    pieces = []
    for i, c in enumerate(lowered):
        if c in _REMOVED:
            continue
        if c == _APOSTROPHE:
            beside = lowered[max(0, i - 1) : i] + lowered[i + 1 : i + 2]
            pieces.append("" if any(_removes(x) for x in beside) else "'")
        elif c in _KEPT:
            pieces.append(c)
        elif set(written := _written(c).lower()) <= _LETTERS:
            pieces.append(written)
    joined = "".join(pieces).replace("- ", " ").replace(" -", " ")
    ascii_text = "".join(c if c in CHARACTERS else _written(c).lower() for c in joined)
    return " ".join(ascii_text.split())


def _written(character: str) -> str:
    from anyascii import anyascii  # only preparing text pays for it

    return anyascii(character)


def _removes(neighbour: str) -> bool:
    """Whether an apostrophe beside it goes: punctuation, a hyphen, or what has no letters."""
    written = _written(neighbour)
    return written == "" or written in _REMOVED or written == "-"
