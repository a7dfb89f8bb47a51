"""What characters mean in a transcript: the decisions of `fedasr.text.normalize`, as data.

Every character that is not a letter of the alphabet separates words, belongs inside one, or stands
for something that is said and that the alphabet cannot write. Which, is decided here, by character
class and by language; what is in no table is decided by its Unicode category, see
`normalize.category_class`.
"""

import re

APOSTROPHES = "'\u2018\u2019\u201b\u02bc\u02bb\u2032\uff07`\u00b4\u055a"
# Between two letters these hyphenate. An en dash is one there (London-Paris), a dash elsewhere.
HYPHENS = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d\u058a\u05be"
MINUS = "\u2212"
# Other dashes always separate, as punctuation does; so do two hyphens in a row.

SEPARATORS = "|"  # a symbol to Unicode, but not said
# Unicode calls these punctuation, but they are read aloud: losing them would lose words.
SPOKEN = frozenset("&%@#§¶‰‱†‡⁊ºª٪")
# Not written and not said: inside a word they join, and nothing is lost without them. NUL is what
# UTF-16 read as bytes leaves between letters.
INVISIBLE = frozenset(
    "\x00\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u200b\u200c\u200d\u200e"
    "\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069"
    "\u206a\u206b\u206c\u206d\u206e\u206f\u3164\ufeff\uffa0\u0640"
)
# Written inside a word, after the vowel that is stressed, called or asked (Armenian).
INSIDE_WORDS = frozenset("\u055b\u055c\u055e\u055f")
# In these scripts joiners between letters are spelling; elsewhere they only choose a form.
JOINERS = "\u200c\u200d"
SPELLED_WITH_JOINERS = "\u0600-\u06ff\u0900-\u0dff"
# A zero-width space is where a word ends in scripts that write none; elsewhere it is a place where
# a line may break.
ENDS_WORDS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
LOST = "\ufffd\x1a"
STOPS = frozenset(".,!?;:\u2026")  # before the mark that ends a quotation

# Annotations of transcribers: in brackets, they name what is heard and not said.
EVENTS = (
    "laughter|laughs?|laughing|noise|music|applause|inaudible|unintelligible|crosstalk|silence|"
    "cough(?:s|ing)?|breath(?:s|ing)?|sighs?|sneezes?|clears throat|background noise|foreign|"
    "unk|unclear|pause|beep|click"
)
ADDRESS = re.compile(
    r"(?:https?://|www\.)\S*\w|\b[\w.-]{0,60}\w\.(?:com|org|net|edu|gov|co\.uk)\b(?![\w'\u2019])"
)
# Not decided: what is said for them is not what is written.
ABBREVIATIONS = re.compile(
    r"(?<![^\W_])(?:w/o|w/|b/c|c/o|km/h|m/s|mi/h|n/a|EE\.\s?UU\.?)(?![^\W_])", re.IGNORECASE
)
# Read letter by letter or as a word, but with dots that separate nothing; besides single letters
# with a dot after each (U.S., z.B.).
DOTTED = re.compile(
    r"(?<![^\W_])(?:Ph\.D|M\.Sc|B\.Sc|Ed\.D|D\.Phil|LL\.[BM]|Th\.D)(?![^\W_])\.?", re.IGNORECASE
)

# Words that begin with an apostrophe, by language: it opens no quotation there.
ELISIONS = {
    language: frozenset(words.split())
    for language, words in {
        "en": "tis twas twere twill em cause cos til till bout round n neath cept tween ere im er "
        "ead less sup nuff scuse kay ome ouse ll ve s re d m t",
        "nl": "s t n k r m ie",
        "de": "s n ne nen nem ner ns rein raus rum rüber runter",
        "it": "sto sta ndrangheta na nu n l un",
        "pt": "tá tava",
    }.items()
}

# Marks of gender, which are pauses inside a word and separate nothing: (before, mark, after).
GENDER = {
    "de": re.compile(
        r"(?<=[^\W\d_])[:*_·•](?=innen)|(?<=[^\W\d_])[:*_·•](?=(?:r|e|n|m|s)(?![^\W_]))"
        r"|(?<=[^\W\d_])[:*_·•](?=in(?![^\W_]))",
        re.IGNORECASE,
    ),
    "fr": re.compile(r"(?<=[^\W\d_])[·⋅‧](?=[^\W\d_])"),
    # Catalan's l·l, which is a letter.
    "ca": re.compile(r"(?<=[lL])[·•⋅‧](?=[lL])"),
}

# Letters of one language that fonts and keyboards write with another's.
SAME_LETTERS = {
    "fa": str.maketrans("يكىۀة", "یکیهه"),
    "ur": str.maketrans("يكه", "یکہ"),
    "ar": str.maketrans("یکٱ", "يكا"),
}
