"""Alphabets: the paper's with a language's own letters, those of scripts, and what data is in."""

import unicodedata

from fedasr.errors import UserError

CHARACTERS = "abcdefghijklmnopqrstuvwxyz '-"
FROM_DATA = "from_data"
# Of attempted handwriting (Willett et al., 2021): space is written ">", the full stop "~".
HANDWRITING = "abcdefghijklmnopqrstuvwxyz ,'.?"

# The letters beside a-z that each language spells its own words with.
_LETTERS = {
    "en": "",
    "de": "äöüß",
    "es": "áéíñóúü",
    "fr": "àâæçèéêëîïôùûüÿœ",
    "it": "àèéìíîòóùú",
    "nl": "àáâäèéêëíïóôöúûü",
    "pt": "àáâãçéêíóôõúü",
}
LANGUAGES = tuple(_LETTERS)

# (first, last) of the code points among which a script's lower-case letters, vowel signs and other
# combining marks are. Hangul is written in its letters (jamo), of which Unicode composes syllables:
# 67 tokens in place of 11,172. Han has no alphabet but that of the data.
_SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "arabic": ((0x0621, 0x063A), (0x0641, 0x0652), (0x0670, 0x0670), (0x0679, 0x06D3)),
    "armenian": ((0x0561, 0x0587),),
    "bengali": ((0x0981, 0x09E3),),
    "cyrillic": ((0x0430, 0x045F), (0x0490, 0x04FF)),
    "devanagari": ((0x0900, 0x0963), (0x0971, 0x097F)),
    "ethiopic": ((0x1200, 0x135A),),
    "georgian": ((0x10D0, 0x10F6),),
    "greek": ((0x0390, 0x0390), (0x03AC, 0x03CE)),
    "gujarati": ((0x0A81, 0x0AE3),),
    "gurmukhi": ((0x0A01, 0x0A75),),
    "hangul": ((0x1100, 0x1112), (0x1161, 0x1175), (0x11A8, 0x11C2)),
    "hebrew": ((0x05D0, 0x05EA),),
    "kana": ((0x3041, 0x3096), (0x309D, 0x309E), (0x30A1, 0x30FA), (0x30FC, 0x30FE)),
    "kannada": ((0x0C81, 0x0CE3),),
    "khmer": ((0x1780, 0x17D3),),
    "lao": ((0x0E81, 0x0ECD), (0x0EDC, 0x0EDF)),
    "malayalam": ((0x0D00, 0x0D63), (0x0D7A, 0x0D7F)),
    "myanmar": ((0x1000, 0x103F), (0x104C, 0x109D)),
    "sinhala": ((0x0D81, 0x0DDF),),
    "tamil": ((0x0B82, 0x0BD7),),
    "telugu": ((0x0C00, 0x0C63),),
    "thai": ((0x0E01, 0x0E3A), (0x0E40, 0x0E4E)),
}
SCRIPTS = tuple(_SCRIPTS)
_ALSO = {"arabic": "\u200c"}  # between letters it is spelling (Persian)


def alphabet(language: str = "en", keep_letters: bool = False) -> str:
    """The characters that transcripts of a language are written with, CTC blank aside.

    Args:
      language: one of `LANGUAGES`.
      keep_letters: add the language's own letters (after the 29, whose ids stay as they are).

    Raises:
      UserError: an unsupported language.
    """
    if language not in _LETTERS:
        raise UserError(
            f"language {language!r} has no alphabet of its own here, only {', '.join(LANGUAGES)} "
            "have: set the alphabet to 'from_data', or to a script such as 'cyrillic'"
        )
    return CHARACTERS + (_LETTERS[language] if keep_letters else "")


def script_alphabet(script: str) -> str:
    """Space, apostrophe, hyphen and then a script's letters and marks, in Unicode's order.

    Args:
      script: one of `SCRIPTS`.

    Raises:
      UserError: an unknown script.
    """
    if script not in _SCRIPTS:
        raise UserError(
            f"the alphabet {script!r} is unknown: use {FROM_DATA!r} or one of {', '.join(SCRIPTS)}"
        )
    found = [chr(code) for a, b in _SCRIPTS[script] for code in range(a, b + 1)]
    # Capitals and what Unicode writes as other characters never come out of the normalisation.
    kept = [
        c
        for c in found
        if unicodedata.category(c)[0] in "LM"
        and c == c.lower()
        and unicodedata.normalize("NFC", c) == c
    ]
    return " '-" + "".join(kept) + _ALSO.get(script, "")
