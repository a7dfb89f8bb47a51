"""Text as the recogniser writes it: normalisation by language, alphabets and tokenizers.

The default alphabet is the paper's (arXiv 2310.00098): a-z, space, apostrophe and hyphen, beside
the CTC blank; text is lower-cased and letters are transliterated to ASCII (é to e, ß to ss). With
`keep_letters` a language's own letters stay, after the paper's; other scripts have alphabets by
name or from the data, and subword tokenizers are read from files.

Letters are transliterated by anyascii: its tables agree with Unidecode's, which the paper used, on
the letters of these languages, and its licence (ISC) suits this package where Unidecode's (GPL)
does not. Encoding damage is repaired by ftfy, whose heuristics for it were measured on large
corpora: it changes nothing that could have been meant.
"""

from fedasr.text.alphabets import (
    CHARACTERS,
    FROM_DATA,
    HANDWRITING,
    LANGUAGES,
    SCRIPTS,
    alphabet,
    script_alphabet,
)
from fedasr.text.folders import folder_tokenizer, prepared_with
from fedasr.text.handwriting import handwriting_text
from fedasr.text.learned import alphabet_of
from fedasr.text.lexicon import pronounced, read_lexicon
from fedasr.text.normalize import (
    REASONS,
    Loss,
    Normalised,
    describe_losses,
    normalise,
    normalize_text,
    parse_losses,
)
from fedasr.text.pronunciation import sentence_phonemes
from fedasr.text.published import published_text
from fedasr.text.tokenizers import (
    PHONEMES,
    SILENCE,
    CharTokenizer,
    NormalisedTokenizer,
    PhonemeTokenizer,
    SubwordTokenizer,
    Tokenizer,
    learned_vocabulary,
    read_subwords,
    subwords_of,
    tokenizer_for,
)

__all__ = [
    "CHARACTERS",
    "FROM_DATA",
    "HANDWRITING",
    "LANGUAGES",
    "PHONEMES",
    "REASONS",
    "SCRIPTS",
    "SILENCE",
    "CharTokenizer",
    "Loss",
    "Normalised",
    "NormalisedTokenizer",
    "PhonemeTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "alphabet",
    "alphabet_of",
    "describe_losses",
    "folder_tokenizer",
    "handwriting_text",
    "learned_vocabulary",
    "normalise",
    "normalize_text",
    "parse_losses",
    "prepared_with",
    "pronounced",
    "published_text",
    "read_lexicon",
    "read_subwords",
    "script_alphabet",
    "sentence_phonemes",
    "subwords_of",
    "tokenizer_for",
]
