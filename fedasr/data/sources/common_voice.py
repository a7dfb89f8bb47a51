"""Common Voice (commonvoice.mozilla.org) as a source: a release's folder, or its archive as it is.

    cv-corpus-VERSION/LANGUAGE/{train,dev,test}.tsv    client_id, path, sentence and more
    cv-corpus-VERSION/LANGUAGE/clips/*.mp3

The user is the `client_id`; the splits are train, dev and test.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedasr.data.archives import ARCHIVES, archive_files, is_archive
from fedasr.data.identity import file_state
from fedasr.data.recordings import AUDIO_ENDINGS, Recording
from fedasr.data.sources.source import SourceOptions
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

SPLITS = ("train", "dev", "test")
_COLUMNS = ("client_id", "path", "sentence")
_METADATA = ("accent", "accents", "age", "device", "gender", "locale", "variant")


@dataclass(frozen=True)
class _Row:
    """One usable line of a split's TSV."""

    user: str
    sentence: str
    split: str
    metadata: tuple[tuple[str, str], ...] = ()


class CommonVoice:
    """Iterable over the utterances of one language of a release, in the same order every time.

    What cannot be used is a `Rejected`: "missing_clip" (a row whose clip is not there),
    "duplicate_id" (a second row with the same clip, in any split: the first in the order train,
    dev, test counts) and "malformed_row" (another number of columns than the header, an empty
    client or path, a path with folders, or bytes that are no UTF-8).

    An archive is read twice as a stream, for its TSVs and for its clips, and never unpacked.

    Attributes:
      name: for people. language: of the rows (their `locale`; the folder's name where they have
      none), such as "en". fingerprint: of the TSVs and
      of the sizes and times of change of the clips (of the archive, where it is the source).
      total: number of items. notes: {"unlisted_clips": clips that no TSV of the release names, not
      even validated.tsv or other.tsv}, if there are any.

    Args:
      path: the folder with the TSVs, a folder of language folders, or a release's archive.
      language: which language; needed where there are several.

    Raises:
      UserError: the path is none of these, the language is not there or not clear, or the archive
        is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], language: str | None = None) -> None:
        path = Path(path).absolute()
        self._archive = path if is_archive(path) else None
        if self._archive:
            self._root, tsvs, clips = _in_archive(path, language)
        else:
            folder = _release_folder(path, language)
            self._root, tsvs, clips = os.fspath(folder), _tsvs(folder), _clips(folder)
        self._rows: dict[str, _Row] = {}  # by clip
        self._rejected: list[Rejected] = []
        locales: set[str] = set()
        for split in SPLITS:
            if split in tsvs:
                locales |= self._read(split, tsvs[split])
        self.language = self._language_of(locales, language, path)
        self.name = f"Common Voice {self.language}"
        named = {clip for content in tsvs.values() for clip in _named_clips(content)}
        unlisted = len(clips - named - set(self._rows))
        self.notes = {"unlisted_clips": unlisted} if unlisted else {}
        for clip in [clip for clip in self._rows if clip not in clips]:
            row = self._rows.pop(clip)
            self._rejected.append(Rejected(clip, "missing_clip", f"{row.split}: {row.sentence}"))
        self.fingerprint = self._fingerprint(path, tsvs)
        self.total = len(self._rows) + len(self._rejected)

    def _language_of(self, locales: set[str], language: str | None, path: Path) -> str:
        """The language that the rows are in, or the folder's name says; as is asked for."""
        name = posixpath.basename(self._root) if self._root != "." else ""
        found = locales.pop() if len(locales) == 1 else name or language
        if found is None:
            raise UserError(f"{path} does not say its language: set the language")
        if language not in (None, found):
            raise UserError(f"{path} holds {found!r}, not the language {language!r}")
        return found

    def _fingerprint(self, path: Path, tsvs: dict[str, bytes]) -> str:
        if self._archive:
            return hashlib.sha256(json.dumps([path.name, *file_state(path)]).encode()).hexdigest()
        digest = hashlib.sha256()
        for name in sorted(tsvs):
            digest.update(json.dumps([name, hashlib.sha256(tsvs[name]).hexdigest()]).encode())
        for clip in self._rows:
            state = file_state(Path(self._root, "clips", clip))
            digest.update(json.dumps([clip, *state]).encode())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Utterance | Rejected]:
        """The rejected first, then the utterances; raises UserError for a damaged archive."""
        yield from self._rejected
        if self._archive is None:
            for clip in self._rows:
                yield self._utterance(clip, os.path.join(self._root, "clips", clip))
            return
        seen: set[str] = set()
        for name, content in archive_files(self._archive, self._is_named):
            clip = posixpath.basename(name)
            if content is not None and clip not in seen:
                seen.add(clip)  # tar allows a name twice
                yield self._utterance(clip, content)

    def _is_named(self, name: str) -> bool:
        folder, clip = posixpath.split(posixpath.normpath(name))
        return folder == posixpath.normpath(f"{self._root}/clips") and clip in self._rows

    def _utterance(self, clip: str, file: str | bytes) -> Utterance:
        row = self._rows[clip]
        metadata = dict(row.metadata)
        return Utterance(clip, row.user, row.sentence, row.split, Recording(file), metadata)

    def _read(self, split: str, content: bytes) -> set[str]:
        """Takes in the rows of a split; returns the languages that they say they are in."""
        header, *lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        names = header.decode("utf-8", "replace").rstrip("\r").split("\t")
        if missing := [name for name in _COLUMNS if name not in names]:
            raise UserError(
                f"{split}.tsv of {self._root} has no column {', '.join(missing)}: is it a release "
                "of Common Voice?"
            )
        locales: set[str] = set()
        for number, line in enumerate(lines, start=2):
            if line.strip():
                where = f"{split}.tsv line {number}"
                fields = _fields(line, names)
                if isinstance(fields, str):
                    self._rejected.append(Rejected(where, "malformed_row", fields))
                elif locale := self._take(fields, split, where):
                    locales.add(locale)
        return locales

    def _take(self, fields: dict[str, str], split: str, where: str) -> str:
        """Takes in a row; returns the language that it says it is in, "" for none or no row."""
        user, clip = fields["client_id"].strip(), fields["path"].strip()
        if not clip or not user or Path(clip).name != clip:
            detail = f"client_id {fields['client_id']!r}, path {fields['path']!r}"
            self._rejected.append(Rejected(where, "malformed_row", detail))
            return ""
        if clip in self._rows:
            self._rejected.append(Rejected(clip, "duplicate_id", where))
            return ""
        carried = tuple(
            (name, value)
            for name, value in sorted(fields.items())
            if name in _METADATA and value.strip()
        )
        self._rows[clip] = _Row(user, fields["sentence"], split, carried)
        return fields.get("locale", "").strip()


def _fields(line: bytes, names: list[str]) -> dict[str, str] | str:
    """The fields of a row by column, or what is wrong with it."""
    try:
        # No quoting: a quotation mark is a character of the sentence.
        fields = line.decode("utf-8").rstrip("\r").split("\t")
    except UnicodeDecodeError as error:
        return str(error)
    if len(fields) != len(names):
        return f"{len(fields)} columns instead of {len(names)}"
    # Of columns of one name the first counts.
    return dict(reversed(list(zip(names, fields, strict=True))))


def _named_clips(content: bytes) -> set[str]:
    """Clips that a TSV names in its column "path"; none where there is no such column."""
    header, *lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    names = header.rstrip(b"\r").split(b"\t")
    if b"path" not in names:
        return set()
    column = names.index(b"path")
    rows = (line.rstrip(b"\r").split(b"\t") for line in lines)
    return {row[column].decode("utf-8", "replace").strip() for row in rows if len(row) > column}


def _is_release(folder: Path) -> bool:
    return (folder / "clips").is_dir() and any((folder / f"{s}.tsv").is_file() for s in SPLITS)


def _release_folder(path: Path, language: str | None) -> Path:
    if not path.is_dir():
        raise _not_common_voice(path)
    if _is_release(path):
        return path
    found = {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and _is_release(p)}
    return found[_chosen(list(found), language, path)]


def _chosen(found: list[str], language: str | None, path: Path) -> str:
    """The one language that is meant."""
    if not found:
        raise _not_common_voice(path)
    if language is None and len(found) == 1:
        return found[0]
    if language not in found:
        what = "which language?" if language is None else f"no language {language!r}:"
        raise UserError(f"{path}: {what} Set the language to one of {', '.join(found)}")
    return language


def _tsvs(folder: Path) -> dict[str, bytes]:
    """{name without .tsv: content}."""
    return {p.stem: p.read_bytes() for p in sorted(folder.glob("*.tsv")) if p.name[0] != "."}


def _clips(folder: Path) -> set[str]:
    """The clips, and by their path those in folders among them, which no row can name."""
    found = set()
    with os.scandir(folder / "clips") as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_file():
                found.add(entry.name)
            elif entry.is_dir():
                below = Path(entry.path).rglob("*")
                found |= {f"{entry.name}/{p.name}" for p in below if p.suffix in AUDIO_ENDINGS}
    return found


def _in_archive(archive: Path, language: str | None) -> tuple[str, dict[str, bytes], set[str]]:
    """(folder of the language within the archive, its TSVs, its clips)."""
    tsvs: dict[str, dict[str, bytes]] = {}
    clips: dict[str, set[str]] = {}
    for name, content in archive_files(archive, lambda name: name.endswith(".tsv")):
        folder, base = posixpath.split(posixpath.normpath(name))
        folder = folder or "."  # the TSVs may be at the archive's root
        if content is not None:
            tsvs.setdefault(folder, {})[base.removesuffix(".tsv")] = content
        elif posixpath.basename(folder) == "clips":
            clips.setdefault(posixpath.dirname(folder) or ".", set()).add(base)
    roots = {
        posixpath.basename(root): root
        for root, files in tsvs.items()
        if set(files) & set(SPLITS) and root in clips
    }
    if set(roots) == {"."}:
        return ".", tsvs["."], clips["."]  # its name says no language
    root = roots[_chosen(sorted(roots), language, archive)]
    return root, tsvs[root], clips[root]


def detect(path: Path) -> bool:
    """Whether this looks like a release, unpacked or packed."""
    if is_archive(path):
        try:
            return bool(_in_archive(path, None))
        except UserError as error:
            return "which language" in str(error)
    if not path.is_dir():
        return False
    try:
        return _is_release(path) or any(p.is_dir() and _is_release(p) for p in path.iterdir())
    except OSError:
        return False


def open_source(path: Path, options: SourceOptions) -> CommonVoice:
    """Opens a release; raises UserError as `CommonVoice`."""
    return CommonVoice(path, options.language)


def _not_common_voice(path: Path) -> UserError:
    return UserError(
        f"{path} is not a release of Common Voice: give the folder of a language (with train.tsv, "
        f"dev.tsv, test.tsv and clips/), its parent, or the release's archive "
        f"({', '.join(ARCHIVES)})"
    )
