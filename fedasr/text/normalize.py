"""Normalisation of transcripts: words as they are said, and a count of what cannot be decided.

The order: damage of the encoding is repaired where there is one reading; then what depends on its
neighbours is decided (abbreviations, apostrophes, dashes, lost letters); then each character is
written in the alphabet, separates words, or is counted with a reason. The tables are in
`fedasr.text.tables`. A transcript with a count is not used: nothing is ever left out of a label.
"""

import functools
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from fedasr.text import tables
from fedasr.text.alphabets import CHARACTERS, alphabet

DIGIT, SIGN, SYMBOL = "digit", "sign that is read aloud", "symbol"
SCRIPT, LETTER = "letter of another script", "letter outside the alphabet"
LOST, CONTROL, DAMAGED = "lost character", "control character", "damaged encoding"
ANNOTATION, ADDRESS, ABBREVIATION = "annotation", "web address", "abbreviation"
OPTIONAL, MASKED = "letters in brackets", "masked letters"
REASONS = {  # what a person can do about each
    DIGIT: "write numbers as words",
    SIGN: "write signs as words",
    SYMBOL: "write symbols as words, or remove them",
    SCRIPT: "--alphabet=from_data keeps letters of other scripts",
    LETTER: "--alphabet=from_data keeps all letters of the data",
    LOST: "mend the source: letters were lost in a conversion",
    CONTROL: "mend the encoding of the source",
    DAMAGED: "mend the encoding of the source",
    ANNOTATION: "remove annotations from the transcripts",
    ADDRESS: "write addresses as they are said",
    ABBREVIATION: "write abbreviations as they are said",
    OPTIONAL: "write the word that is said",
    MASKED: "write the word that is said",
}


class Loss(NamedTuple):
    """Something that cannot be written as it is said: the characters, and one of `REASONS`."""

    characters: str
    reason: str


class Normalised(NamedTuple):
    """text: what is written, without spaces at its ends. losses: in no particular order."""

    text: str
    losses: tuple[Loss, ...]


def normalize_text(text: str, language: str = "en", keep_letters: bool = False) -> tuple[str, int]:
    """The normalised text in the language's alphabet, and how many losses it has.

    See `normalise`, which says what they are.

    Args:
      text: any text.
      language: one of `LANGUAGES`.
      keep_letters: keep the language's own letters; accents of other languages still go.

    Raises:
      UserError: an unsupported language.
    """
    found = normalise(text, language, alphabet(language, keep_letters))
    return found.text, len(found.losses)


def normalise(text: str, language: str = "en", characters: str | None = CHARACTERS) -> Normalised:
    """Lower-cases a text, writes it in an alphabet, and says what cannot be written.

    Of Latin alphabets, letters outside them are transliterated (é to e, ß to ss). White space,
    punctuation, dashes, slashes and dots separate words, apostrophes and single hyphens between
    letters belong to them; initials are joined (U.S. to us). Quotation marks, hyphens and marks of
    gender are told apart by their neighbours. Digits, signs that are read aloud (& % @ #), symbols,
    letters of other scripts, lost characters (don?t, U+FFFD), annotations and what else cannot be
    decided are left out, as a word boundary, and counted.

    Normalised text is left as it is, in every alphabet that holds its characters.

    Args:
      text: any text.
      language: a code such as "de", for what depends on it; any other means no special rules.
      characters: the alphabet; None for all letters and marks that there are (`from_data`).
    """
    losses: list[Loss] = []
    if characters is None or not set(text) <= set(characters):
        text = _repaired(text, language, characters, losses)
    text = _in_context(text, language, losses)
    same = tables.SAME_LETTERS.get(language, {})
    lowered = _lowered(text.translate(same), language)
    # With its marks: an accent of its own may be part of a letter of the alphabet.
    pieces = []
    for c in unicodedata.normalize("NFC", lowered):
        piece, reason = _fold(c, characters)
        if reason is not None:
            losses.append(Loss(c, reason))
        pieces.append(piece)
    written = _without_quotes("".join(pieces), language)
    if characters is None or not characters.isascii():
        written = unicodedata.normalize("NFC", written)
    # Again, for what ligatures and other forms of letters stood for.
    written = written.translate(
        {c: x for c, x in same.items() if characters is None or chr(x) in characters}
    )
    parts = (part.strip("-") for part in _HYPHEN_RUN.sub(" ", written).split())
    words = [part for part in parts if any(map(str.isalpha, part))]
    if characters is None:
        words = _of_one_reading(words, losses)
    return Normalised(" ".join(words), tuple(losses))


# ------------------------------------------------------------------------------------- encodings


# What Windows-1252 has where Latin-1 has controls; of its letters only those of few readings.
_C1_PUNCTUATION = {
    byte: bytes([byte]).decode("cp1252")
    for byte in (0x82, 0x84, 0x85, 0x8B, *range(0x91, 0x98), 0x9B)
}
_C1_LETTERS = {"fr": {0x8C: "Œ", 0x9C: "œ"}}
_C1 = re.compile("[\x80-\x9f]")
# What UTF-8 looks like as Latin-1 or Windows-1252: a letter, then a sign beyond ASCII.
_LEFT = re.compile("[\u00c0-\u00ff][^\\w\\s\\x00-\\x7f]|[\u00c2\u00c3\u00d7](?!\\w)")
# Letters of phonetics and of few languages: that UTF-8 of them was damaged is less likely than that
# nothing was.
_RARE = re.compile("[\u0180-\u019f\u01a2-\u01ae\u01b1-\u0217\u021c-\u0385\u0483-\u0489]")
# Words of these languages have no four letters in a row, three of them different and none ASCII:
# this is another script, read as Latin-1.
_FOREIGN = re.compile("[\u00c0-\u024f]{4,}")
_ENTITY = re.compile(r"&(?:#\w+|\w+);")
_LITERAL_ESCAPE = re.compile(r"\\(?=['\"\u2019])")


def _repaired(text: str, language: str, characters: str | None, losses: list[Loss]) -> str:
    """Undoes damage that has one reading, and counts other damage."""
    text = _ENTITY.sub(lambda m: html.unescape(m[0]), text)
    text = _LITERAL_ESCAPE.sub("", text)
    if text.isascii():
        return text
    text = _without_mojibake(text, losses)
    letters = _C1_LETTERS.get(language, {})

    def control(match: re.Match[str]) -> str:
        byte = ord(match[0])
        known = _C1_PUNCTUATION.get(byte) or letters.get(byte)
        if known is None:
            losses.append(Loss(match[0], CONTROL))
        return known or " "

    text = _C1.sub(control, text)
    if characters is None or "a" not in characters:
        return text

    def foreign(match: re.Match[str]) -> str:
        if len(set(match[0].lower())) < 3:
            return match[0]
        losses.append(Loss(match[0], DAMAGED))
        return " "

    return _FOREIGN.sub(foreign, text)


def _of_one_reading(words: list[str], losses: list[Loss]) -> list[str]:
    """Counts the words beyond ASCII of a normalised text that would pass for damage itself."""
    text = " ".join(words)
    if text.isascii() or _without_mojibake(text, []) == text:
        return words
    losses += [Loss(word, DAMAGED) for word in words if not word.isascii()]
    return [word for word in words if word.isascii()]


def _without_mojibake(text: str, losses: list[Loss]) -> str:
    """UTF-8 that was decoded as something else, decoded again: by ftfy's plan, without guesses."""
    import ftfy  # only texts beyond ASCII pay for it
    from ftfy.badness import is_bad

    if not is_bad(text):
        return text
    config = ftfy.TextFixerConfig(
        unescape_html=False, replace_lossy_sequences=False, fix_c1_controls=False
    )
    plan: list[tuple[str, str]] = []
    fixed = text
    for _ in range(4):  # damaged more than once
        once, steps = ftfy.fix_encoding_and_explain(fixed, config)
        windows = ("decode", "windows-1252") in (steps or ())  # see `_C1`
        if once == fixed or windows:
            break
        if _RARE.search("".join(set(once) - set(fixed))):
            return fixed
        fixed, plan = once, [*plan, *(steps or ())]
    if not plan and not is_bad(fixed):
        return fixed

    def damaged(match: re.Match[str]) -> str:
        losses.append(Loss(match[0], DAMAGED))
        return " "

    return _LEFT.sub(damaged, fixed)


# --------------------------------------------------------------------------------- neighbourhood

_L = r"[^\W\d_]"  # a letter
_WORD = r"[^\W_]"  # a letter or digit
_FULL_WIDTH = {
    c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F) if chr(c) not in "\uff07\uff0d\uff5e"
}
_HALF_WIDTH = re.compile("[\uff65-\uff9f]+")  # katakana, whose voicing marks are letters there
_EVENT = re.compile(rf"[\[(<{{*]\s*(?:{tables.EVENTS})\s*[\])>}}*]", re.IGNORECASE)
_INITIALS = re.compile(
    rf"(?<!{_WORD})(?:(?:{_L}\.)+{_L}(?!['\u2019]?{_WORD})\.?|(?:{_L}\.){{2,}})(?P<next>{_WORD}?)"
)
_OPTIONAL = re.compile(
    rf"(?<={_L})[(\[](?:{_L}{{1,2}}|innen)[)\]]|(?<={_L})[(\[]{_L}+[)\]](?={_L})"
    rf"|(?<!{_WORD})[(\[]{_L}{{1,3}}[)\]](?={_L})"
)
_GERMAN_SLASH = re.compile(rf"(?<={_L})/-?in(?:nen)?(?!{_WORD})")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*]+)(?<=[^\s*])\1(?![\w*])")
_MASKED = re.compile(rf"(?<={_L})\*+(?={_L})|\*{{2,}}")
_QUESTION = re.compile(r"\?+")
_BACKSLASH = re.compile(rf"\\(?=[nrtux]{_WORD})")
_HEBREW_MARK = re.compile('(?<=[\u0590-\u05ff])["\u05f4](?=[\u0590-\u05ff])')
_WORD_END = re.compile(f"(?<=[{tables.ENDS_WORDS}])\u200b|\u200b(?=[{tables.ENDS_WORDS}])")
_LOOSE_JOINER = re.compile(
    f"(?<![{tables.SPELLED_WITH_JOINERS}])[{tables.JOINERS}]"
    f"|[{tables.JOINERS}](?![{tables.SPELLED_WITH_JOINERS}])"
)
_INVISIBLE = str.maketrans(dict.fromkeys(tables.INVISIBLE - set(tables.JOINERS)))
_LOOSE_MINUS = re.compile(rf"(?<!{_L}){tables.MINUS}|{tables.MINUS}(?!{_L})")


def _in_context(text: str, language: str, losses: list[Loss]) -> str:
    """Decides what depends on the characters beside it."""

    def lose(reason: str):
        def replace(match: re.Match[str]) -> str:
            losses.append(Loss(match[0].strip(), reason))
            return " "

        return replace

    text = _LOOSE_JOINER.sub("", _WORD_END.sub(" ", text)).translate(_INVISIBLE)
    text = _HALF_WIDTH.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = unicodedata.normalize("NFC", text.translate(_FULL_WIDTH))
    text = _EVENT.sub(lose(ANNOTATION), text)
    text = tables.ADDRESS.sub(lose(ADDRESS), text)
    text = tables.ABBREVIATIONS.sub(lose(ABBREVIATION), text)
    text = _BACKSLASH.sub(lose(CONTROL), text)
    text = tables.DOTTED.sub(lambda m: m[0].replace(".", ""), text)
    text = _INITIALS.sub(_joined_initials, text)
    if language in tables.GENDER:
        text = tables.GENDER[language].sub("", text)
    if language == "de":
        text = _GERMAN_SLASH.sub(lose(ABBREVIATION), text)
    text = _OPTIONAL.sub(lose(OPTIONAL), text)
    text = _EMPHASIS.sub(r" \2 ", text)
    text = _MASKED.sub(lose(MASKED), text)
    text = _QUESTION.sub(lambda m: _question(text, m, losses), text)
    text = _HEBREW_MARK.sub("", text)
    return _LOOSE_MINUS.sub(lambda m: _minus(text, m, losses), text)


def _joined_initials(match: re.Match[str]) -> str:
    joined = match[0][: len(match[0]) - len(match["next"])].replace(".", "")
    return f"{joined} {match['next']}" if match["next"] else joined


def _question(text: str, match: re.Match[str], losses: list[Loss]) -> str:
    """A question mark separates; where no sentence can begin, a letter was lost there.

    Programs write "?" for what an encoding cannot hold. After it a sentence begins with a capital.
    """
    before = text[match.start() - 1 : match.start()] if match.start() else ""
    after = text[match.end() : match.end() + 1]
    if not after.isalpha() or after == after.swapcase():  # the end, or a script without case
        return " "
    inside = before.isalpha()
    # "What?No" is two sentences; "don?t" and "?t?" are not, "WAIT?NO" is not decided.
    if inside and after.isupper() and not before.isupper():
        return " "
    if not inside and before and not before.isspace():
        return " "
    losses.append(Loss(match[0], LOST))
    return " "


def _minus(text: str, match: re.Match[str], losses: list[Loss]) -> str:
    """A minus sign is said, unless it is a dash between words."""
    left, right = text[: match.start()].rstrip()[-1:], text[match.end() :].lstrip()[:1]
    if (left.isalpha() and right.isalpha()) or left.isdigit() or right.isdigit():
        losses.append(Loss(match[0], SIGN))
    return " "


_HYPHEN_RUN = re.compile("-{2,}")
_ESCAPED_APOSTROPHE = re.compile(rf"(?<={_L})''(?={_L})")
_APOSTROPHE_RUN = re.compile("'{2,}")
_APOSTROPHE = re.compile("'")
_LETTERS = re.compile(rf"{_L}*")
_STOP = "\n"  # of a folded text: white space where punctuation was


def _without_quotes(folded: str, language: str) -> str:
    """Removes apostrophes that are quotation marks: loose ones, and pairs at the edges of words.

    An apostrophe alone at an edge belongs to the word ('tis, dogs'), and so does one before a word
    that the language shortens, whatever follows.
    """
    if "'" not in folded:
        return folded
    text = _APOSTROPHE_RUN.sub(" ", _ESCAPED_APOSTROPHE.sub("'", folded))
    elisions = tables.ELISIONS.get(language, frozenset())
    drop: set[int] = set()
    openers: list[int] = []
    for match in _APOSTROPHE.finditer(text):
        place = match.start()
        before, after = text[:place][-1:], text[place + 1 : place + 2]
        left, right = _in_word(before), _in_word(after)
        if right and not left:
            letters = _LETTERS.match(text, place + 1)
            if letters is None or letters[0] not in elisions:
                openers.append(place)
        elif not right:
            if openers and (left or before == _STOP):
                drop |= {openers.pop(), place}
            elif not left:
                drop.add(place)
    return "".join(" " if i in drop else c for i, c in enumerate(text))


def _in_word(c: str) -> bool:
    return bool(c) and unicodedata.category(c)[0] in "LM"


# ------------------------------------------------------------------------------------ characters


def _lowered(text: str, language: str) -> str:
    if language in ("tr", "az"):
        text = text.replace("I", "\u0131")
    return text.replace("\u0130", "i").lower()  # Unicode's own would keep the dot as a mark


def _transliterated(letter: str) -> str | None:
    """A Latin letter in lower-case ASCII letters, None for anything else."""
    # Letters of other scripts are not transliterated: how they are read aloud is not known.
    if not unicodedata.name(letter, "").startswith("LATIN "):
        return None
    from anyascii import anyascii  # only texts with such letters pay for it

    ascii_letters = anyascii(letter).lower()
    fits = ascii_letters and all("a" <= c <= "z" for c in ascii_letters)
    return ascii_letters if fits else None


# Forms of a letter that are the letter; what is raised, circled or a fraction is something else.
_SAME = (
    "<wide>",
    "<narrow>",
    "<font>",
    "<initial>",
    "<medial>",
    "<final>",
    "<isolated>",
    "<small>",
)


def _compatible(c: str) -> str:
    """A presentation form, ligature or other font as plain letters; anything else as it is."""
    form = unicodedata.decomposition(c).split(" ")[0]
    name = unicodedata.name(c, "")
    if c == "\u0587":  # Armenian spells with it
        return c
    if form in _SAME or (form == "<compat>" and name.startswith(("LATIN ", "ARMENIAN "))):
        return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", c)).lower()
    return c


@functools.lru_cache(maxsize=8192)
def _fold(c: str, characters: str | None) -> tuple[str, str | None]:
    """(what is written for a lower-case character, why it is a loss or None)."""
    if c == " " or (characters is not None and c in characters):
        return c, None
    if (listed := _listed(c, characters)) is not None:
        return listed
    category = unicodedata.category(c)
    if c.isspace() or category[0] == "Z" or c in tables.SEPARATORS:
        return " ", None
    if category[0] == "P":
        return _STOP if c in tables.STOPS else " ", None
    if category[0] == "L":
        return _folded_letter(c, characters)
    if category[0] == "M":
        return _folded_mark(c, category, characters), None
    if category[0] == "N":
        return " ", DIGIT
    return " ", CONTROL if category in ("Cc", "Cf") else SYMBOL


def _listed(c: str, characters: str | None) -> tuple[str, str | None] | None:
    """As `_fold`, of what `fedasr.text.tables` lists; None for anything else."""
    if characters is None and c in tables.JOINERS:
        return c, None
    if c in tables.INVISIBLE or c in tables.INSIDE_WORDS:
        return "", None
    if c in tables.LOST:
        return " ", LOST
    if c in tables.SPOKEN:
        return " ", SIGN
    if c in tables.HYPHENS or c in tables.APOSTROPHES:
        plain = "-" if c in tables.HYPHENS else "'"
        if characters is None or plain in characters:
            return plain, None
        return (" ", None) if plain == "-" else (" ", LETTER)
    return None


def _folded_mark(c: str, category: str, characters: str | None) -> str:
    """A mark by itself: nothing, but in an alphabet that is yet to be found it is part of it."""
    drawn = category == "Me" or "VARIATION SELECTOR" in unicodedata.name(c, "")
    return "" if drawn or characters is not None else c


def _folded_letter(c: str, characters: str | None) -> tuple[str, str | None]:
    if unicodedata.decomposition(c).startswith(("<super>", "<sub>")):
        return " ", SIGN  # an ordinal, or a note
    plain = _compatible(c)
    if characters is None:
        return plain, None
    if plain != c:
        folded = [_fold(x, characters) for x in plain]
        reason = next((r for _, r in folded if r), None)
        return "".join(piece for piece, _ in folded), reason
    if "a" in characters and (letters := _transliterated(c)):
        return letters, None
    written = _by_its_parts(c, characters)
    return (" ", SCRIPT) if written is None else (written, None)


def _by_its_parts(c: str, characters: str) -> str | None:
    """A letter by the letters and marks that it is made of; None where they are not written."""
    parts = unicodedata.normalize("NFD", c)
    if all(x in characters for x in parts):
        return parts  # Hangul by its letters
    base = "".join(x for x in parts if unicodedata.category(x)[0] != "M")
    without_marks = base != c and base and "a" not in characters
    return base if without_marks and all(x in characters for x in base) else None


# --------------------------------------------------------------------------------------- reports


def describe_losses(losses: Iterable[Loss], text: str) -> str:
    """One line for people, which `parse_losses` reads: what, why and how often, then the text."""
    counts = Counter(losses)
    parts = [f"{_shown(x.characters)} ({x.reason}) x{n}" for x, n in sorted(counts.items())]
    return f"{', '.join(parts[:8])} in {text!r}"


_DESCRIBED = re.compile(r"(\S+) \(([a-z ]+)\) x(\d+)(?:, | in )")


def parse_losses(line: str) -> Counter[tuple[str, str]]:
    """How often each (shown characters, reason) is in a line of `describe_losses`."""
    counts: Counter[tuple[str, str]] = Counter()
    place = 0
    while match := _DESCRIBED.match(line, place):
        counts[match[1], match[2]] += int(match[3])
        place = match.end()
        if match[0].endswith(" in "):
            break
    return counts


def _shown(characters: str) -> str:
    """Without white space, and legible whatever it is."""
    shown = "".join(characters.split())[:20]
    if len(shown) == 1 and not (shown.isprintable() and shown.isascii()):
        code = f"U+{ord(shown):04X}"
        return f"{shown}[{code}]" if shown.isprintable() else code
    return shown if shown.isprintable() and shown else ascii(shown)
