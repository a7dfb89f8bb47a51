"""Tokenizers: text to the ids that a recogniser writes, and back. Id 0 is the blank of all."""

import base64
import functools
import hashlib
import os
import tarfile
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedasr.errors import UserError, pass_exhaustion
from fedasr.text.alphabets import CHARACTERS
from fedasr.text.normalize import normalise

# Of CMUdict, without stress; silence separates words.
PHONEMES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W "
    "Y Z ZH"
).split()
SILENCE = "SIL"


class CharTokenizer:
    """Characters to ids: 0 is the CTC blank, then the alphabet in its order.

    By default 1..26 are a-z, 27 space, 28 apostrophe, 29 hyphen.

    Attributes:
      characters: the alphabet. vocab_size: its size and the blank. blank: the blank's id, 0.

    Raises:
      UserError: a character twice in the alphabet, or none at all.
    """

    blank: ClassVar[int] = 0

    def __init__(self, characters: str = CHARACTERS) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise UserError(f"the alphabet {characters!r} must hold characters, each once")
        self.characters = characters
        self.vocab_size = len(characters) + 1
        self._ids = {c: i for i, c in enumerate(characters, start=1)}
        # Such stand for signs of tokens that others made (see `fedasr.text.folders`).
        self._never = {self.blank, *(i for c, i in self._ids.items() if "\ue000" <= c <= "\uf8ff")}

    def encode(self, text: str, pad_space: bool = False) -> np.ndarray:
        """The ids of normalised text.

        Args:
          text: characters of the alphabet only, as `normalize_text` returns them.
          pad_space: put a space on both sides, as the paper's targets have.

        Returns:
          int32 [characters], each in 1..vocab_size - 1.

        Raises:
          UserError: a character outside the alphabet.
        """
        if pad_space:
            text = f" {text} "
        if not all(c in self._ids for c in text):  # such as Hangul by its letters
            text = unicodedata.normalize("NFD", text)
        try:
            return np.array([self._ids[c] for c in text], np.int32)
        except KeyError as error:
            raise UserError(
                f"character {error.args[0]!r} is not in the alphabet: use normalize_text first"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without spaces at its ends; blanks (also used as padding) are skipped.

        Letters and their marks are composed (NFC); private-use characters are left out.

        Args:
          ids: integers in 0..vocab_size - 1.

        Raises:
          ValueError: an id out of range.
        """
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if ((ids < 0) | (ids >= self.vocab_size)).any():
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}")
        text = "".join(self.characters[i - 1] for i in ids if i not in self._never).strip()
        return text if text.isascii() else unicodedata.normalize("NFC", text)


class PhonemeTokenizer:
    """Phonemes to ids: 0 is the CTC blank, 1..39 `PHONEMES`, 40 `SILENCE`, which separates words.

    A text is a sequence of their names with spaces between: what counts words counts phonemes.

    Attributes:
      characters: the names, a list. vocab_size, blank: as of `CharTokenizer`.
    """

    blank: ClassVar[int] = 0

    def __init__(self) -> None:
        self.characters = [*PHONEMES, SILENCE]
        self.vocab_size = len(self.characters) + 1
        self._ids = {name: i for i, name in enumerate(self.characters, start=1)}

    def encode(self, text: str, pad_space: bool = False) -> np.ndarray:
        """The ids of phonemes, int32 [phonemes]; `pad_space` puts silence on both sides.

        Raises:
          UserError: no such phoneme.
        """
        names = text.split()
        if pad_space:
            names = [SILENCE, *names, SILENCE]
        try:
            return np.array([self._ids[name] for name in names], np.int32)
        except KeyError as error:
            raise UserError(f"{error.args[0]!r} is no phoneme of {self.characters}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The names of ids in 0..40, silence at the ends and blanks left out.

        Raises:
          ValueError: an id out of range.
        """
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}")
        names = [self.characters[i - 1] for i in ids if i != self.blank]
        while names and names[-1] == SILENCE:
            names.pop()
        start = next((i for i, name in enumerate(names) if name != SILENCE), 0)
        return " ".join(names[start:])


class SubwordTokenizer:
    """Pieces of words to ids: 0 is the blank, then the pieces of a SentencePiece model or of a
    Hugging Face `tokenizer.json`, each one higher than its id there.

    The pieces' own signs for unknown, begin, end and padding are never written. Texts are lower
    case here; a model whose pieces are all in capitals is given capitals.

    Args:
      model: content of the file.

    Attributes:
      unwritten: how many signs come after the last piece.
      kind: "sentencepiece" or "tokenizers". characters: the pieces, a list. alphabet: the
        characters that some piece holds, in lower case, for `fedasr.text.normalise`. vocab_size:
        the pieces and the blank. blank: 0. options: what `tokenizer_for` makes it from.

    Raises:
      UserError: the package that reads it is missing, or it is no such file.
    """

    blank: ClassVar[int] = 0

    def __init__(self, model: bytes) -> None:
        self.kind = "tokenizers" if model.lstrip()[:1] == b"{" else "sentencepiece"
        self._backend: Any = _HuggingFace(model) if self.kind == "tokenizers" else _Pieces(model)
        self.characters: list[str] = self._backend.pieces
        self.vocab_size = len(self.characters) + 1
        kept = [i for i in range(len(self.characters)) if i not in self._backend.signs]
        self.unwritten = len(self.characters) - 1 - max(kept, default=-1)
        letters = {c for c in "".join(self._backend.texts) if c.isalpha()}
        self._upper = (
            bool(letters)
            and letters == {c for c in letters if c == c.upper()}
            and any(c != c.lower() for c in letters)
        )
        text = "".join(self._backend.texts)
        self.alphabet = "".join(sorted(set((text.lower() if self._upper else text) + " ")))
        self.options = {
            "kind": self.kind,
            "sha256": hashlib.sha256(model).hexdigest(),
            "model": base64.b64encode(model).decode(),
        }

    def encode(self, text: str, pad_space: bool = False) -> np.ndarray:
        """The ids of normalised text, int32 [pieces], each in 1..vocab_size - 1.

        Args:
          text: words with a space between.
          pad_space: nothing: a piece says itself where a word begins.

        Raises:
          UserError: the pieces cannot write it; decoding gives another text.
        """
        ids = np.asarray(self._backend.encode(text.upper() if self._upper else text), np.int32) + 1
        if (back := self.decode(ids)) != text:
            raise UserError(
                f"the tokenizer cannot write {text!r}, it gives {back!r}: use a model that was "
                "learned from normalised text (lower case, without punctuation)"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, words with a space between; blanks and the pieces' signs are skipped.

        Raises:
          ValueError: an id out of range.
        """
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}")
        text = " ".join(self._backend.decode([i - 1 for i in ids if i != self.blank]).split())
        return text.lower() if self._upper else text


class _Pieces:
    """A SentencePiece model."""

    def __init__(self, model: bytes) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                "a SentencePiece model needs the package: pip install 'fedasr[sentencepiece]'"
            ) from None
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            count = self._model.get_piece_size()
        except Exception as error:  # of a kind that depends on the version
            pass_exhaustion(error, "reading a SentencePiece model")
            raise UserError(f"this is no SentencePiece model: {error}") from error
        self.pieces = [self._model.id_to_piece(i) for i in range(count)]
        self.signs = {
            i
            for i in range(count)
            if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i)
        }
        self.texts = [
            piece.replace("\u2581", " ")
            for i, piece in enumerate(self.pieces)
            if i not in self.signs and not self._model.is_byte(i)
        ]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i not in self.signs])


class _HuggingFace:
    """A `tokenizer.json`."""

    def __init__(self, model: bytes) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "a tokenizer.json needs the package: pip install 'fedasr[tokenizers]'"
            ) from None
        try:
            self._model = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # of no kind of its own
            pass_exhaustion(error, "reading a tokenizer.json")
            raise UserError(f"this is no tokenizer.json: {error}") from error
        count = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.pieces = [self._model.id_to_token(i) or f"<{i}>" for i in range(count)]
        added = self._model.get_added_tokens_decoder()
        self.signs = {i for i, token in added.items() if token.special}
        unknown = getattr(self._model.model, "unk_token", None)
        if unknown is not None and (i := self._model.token_to_id(unknown)) is not None:
            self.signs.add(i)
        self._model.no_padding()
        self._model.no_truncation()
        kept = [i for i in range(count) if i not in self.signs]
        # Each by the tokenizer's own decoder: pieces may be bytes in disguise, or marked.
        self.texts = [self._model.decode([i]) for i in kept]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i not in self.signs])


def read_subwords(path: str | os.PathLike[str]) -> SubwordTokenizer:
    """Reads a SentencePiece model, also that of NeMo's archive of a model, or a `tokenizer.json`.

    Raises:
      UserError: it cannot be read, is neither, or the package that reads it is missing.
    """
    try:
        content = _of_archive(path) if str(path).endswith(".nemo") else Path(path).read_bytes()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error}") from error
    try:
        return SubwordTokenizer(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _of_archive(path: str | os.PathLike[str]) -> bytes:
    """The SentencePiece model in a tar."""
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if member.name.endswith("tokenizer.model") and (file := archive.extractfile(member)):
                return file.read()
    raise UserError(f"{path} holds no tokenizer of pieces (*tokenizer.model): use another model")


class NormalisedTokenizer(SubwordTokenizer):
    """A tokenizer whose texts are normalised: of models that write capitals and punctuation.

    Args:
      tokenizer: whose pieces it has.
      language: of the normalisation.
    """

    def __init__(self, tokenizer: SubwordTokenizer, language: str = "en") -> None:
        vars(self).update(vars(tokenizer))
        self._language = language

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, normalised (see `normalise`); what cannot be written is left out."""
        return normalise(super().decode(ids), self._language).text


Tokenizer = CharTokenizer | PhonemeTokenizer | SubwordTokenizer


@functools.lru_cache(maxsize=4)
def _subwords(model: str) -> SubwordTokenizer:
    return SubwordTokenizer(base64.b64decode(model))


def subwords_of(options: Mapping[str, Any]) -> SubwordTokenizer:
    """The tokenizer of `SubwordTokenizer.options`."""
    return _subwords(options["model"])


def tokenizer_for(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that wrote a prepared corpus's labels.

    Args:
      metadata: of `fedasr.data.records.read_metadata`; `options.characters` is the alphabet, a list
        for phonemes; `options.subwords` a subword tokenizer.

    Raises:
      UserError: the metadata names no alphabet.
    """
    options = metadata.get("options", {})
    if options.get("subwords"):
        return subwords_of(options["subwords"])
    characters = options.get("characters")
    if characters == PhonemeTokenizer().characters:
        return PhonemeTokenizer()
    if not isinstance(characters, str):
        raise UserError("the corpus does not say its alphabet (options.characters): prepare again")
    return CharTokenizer(characters)


def learned_vocabulary(metadata: Mapping[str, Any]) -> str:
    """What a corpus's labels say of texts without privacy, in one line; "" for nothing.

    Args:
      metadata: as for `tokenizer_for`.
    """
    options = metadata.get("options", {})
    if options.get("subwords"):
        return "the texts that the subword vocabulary was learned from, if they are of these users"
    if options.get("learned"):
        return "which characters occur in the transcripts (the alphabet was made from them)"
    return ""
