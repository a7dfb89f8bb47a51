"""LibriSpeech (openslr.org/12) as a source: its folders as unpacked, or its archives as they are.

    LibriSpeech/SUBSET/READER/CHAPTER/READER-CHAPTER-NUMBER.flac    (or .wav, .mp3, .ogg, .opus)
    LibriSpeech/SUBSET/READER/CHAPTER/READER-CHAPTER.trans.txt    lines of ID TRANSCRIPT

The user is the reader, and every subset is a split: train-clean-100 is `train_clean_100`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from fedasr.data.archives import ARCHIVES, archive_files, is_archive
from fedasr.data.corpus import valid_split_name
from fedasr.data.identity import file_state
from fedasr.data.recordings import AUDIO_ENDINGS, Recording
from fedasr.data.sources.files import walk
from fedasr.data.sources.source import SourceOptions
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

_AUDIO, _TRANSCRIPTS = ".flac", ".trans.txt"


class LibriSpeech:
    """Iterable over the utterances of LibriSpeech, in the same order every time.

    What cannot be used is a `Rejected`: "missing_transcript" (audio without a line),
    "missing_audio" (a line without audio), "duplicate_id" (a second line, or a second file of the
    same split, with the same id), "bad_transcript_line", "misplaced_audio" (the file's name gives
    another reader than its folder, or the folder is none of a subset), and what cannot be visited:
    "broken_link", "unreadable_folder". Links to folders are followed.

    An archive is read twice as a stream, for its transcripts and for its audio, and never unpacked.

    Attributes:
      name: for people. fingerprint: of names, sizes and times of change of all files (of the
      archives, where they are the source). total: number of items. notes: {"archives_not_read"},
      where archives lie beside what is unpacked. language: "en".

    Args:
      path: the LibriSpeech folder, its parent, the folder of one subset, an archive, or a folder of
        archives.

    Raises:
      UserError: the path is none of these, or an archive is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._root, self._archives, beside = _find(Path(path).absolute())
        self.language = "en"
        self._unvisited: dict[str, Rejected] = {}
        self._transcripts = _Transcripts()
        self._audio: dict[tuple[str, str], str] = {}  # (split, id): name of the file
        rejected: list[Rejected] = []
        digest = hashlib.sha256()
        for archive in self._archives:
            digest.update(json.dumps([archive.name, *file_state(archive)]).encode())
        for name, content in self._inventory(_TRANSCRIPTS):
            if not self._archives:
                state = file_state(Path(name))
                digest.update(json.dumps([*Path(name).parts[-4:], *state]).encode())
            if name.lower().endswith(ARCHIVES):
                beside += 1
            elif name.lower().endswith(_TRANSCRIPTS):
                assert content is not None  # as `_TRANSCRIPTS` are asked for
                self._transcripts.read(name, content)
            elif problem := self._add(name):
                rejected.append(problem)
        if not self._audio:
            raise _not_librispeech(path)
        self.notes = {"archives_not_read": beside} if beside else {}
        self.fingerprint = digest.hexdigest()
        names = ", ".join(sorted({split for split, _ in self._audio}))
        self.name = f"LibriSpeech {names}"
        self._rejected = [*rejected, *self._transcripts.rejected, *self._unvisited.values()]
        self._rejected += self._unpaired()
        usable = sum(key in self._transcripts.lines for key in self._audio)
        self.total = len(self._rejected) + usable

    def _unpaired(self) -> list[Rejected]:
        """Audio without a line, and lines without audio."""
        lines = self._transcripts.lines
        without_line = [
            Rejected(id, "missing_transcript", self._audio[split, id])
            for split, id in self._audio
            if (split, id) not in lines
        ]
        without_audio = [
            Rejected(id, "missing_audio", f"{split}: {text}")
            for (split, id), text in lines.items()
            if (split, id) not in self._audio
        ]
        return without_line + without_audio

    def __iter__(self) -> Iterator[Utterance | Rejected]:
        """The rejected first, then the utterances; raises UserError for a damaged archive."""
        yield from self._rejected
        seen: set[str] = set()  # an archive may hold a name twice
        for name, content in self._inventory(AUDIO_ENDINGS if self._archives else None):
            split, reader, id = _parts(name)
            known = self._audio.get((split, id)) == name and name not in seen
            if not known or (split, id) not in self._transcripts.lines:
                continue
            seen.add(name)
            # A path is opened where it is decoded; what an archive holds is here only now.
            file = content if self._archives else name
            assert file is not None  # as audio is asked for
            yield Utterance(
                id=id,
                user=reader,
                text=self._transcripts.lines[split, id],
                split=split,
                audio=Recording(file),
            )

    def _inventory(self, read: str | tuple[str, ...] | None) -> Iterator[tuple[str, bytes | None]]:
        """Every file of audio or transcripts: (name, content where the name ends in `read`).

        Archives below a folder are given, too, and not read.
        """
        kinds = (*AUDIO_ENDINGS, _TRANSCRIPTS)

        def wanted(name: str) -> bool:
            return read is not None and name.lower().endswith(read)

        for archive in self._archives:
            for name, content in archive_files(archive, wanted):
                if name.lower().endswith(kinds):
                    yield name, content
        if self._root is not None:
            for path in walk(self._root, self._unvisited):
                if path.name.lower().endswith((*kinds, *ARCHIVES)):
                    content = None
                    if wanted(path.name):
                        try:
                            content = path.read_bytes()
                        except OSError as error:
                            name = os.fspath(path)
                            detail = error.strerror or str(error)
                            self._unvisited[name] = Rejected(name, "unreadable_transcripts", detail)
                            continue
                    yield os.fspath(path), content

    def _add(self, name: str) -> Rejected | None:
        """Registers a file of audio; returns why not, if it cannot be used."""
        split, reader, id = _parts(name)
        if not valid_split_name(split) or id.split("-")[0] != reader:
            return Rejected(id, "misplaced_audio", name)
        if (split, id) in self._audio:
            return Rejected(id, "duplicate_id", name)
        self._audio[split, id] = name
        return None


class _Transcripts:
    """The lines of all transcript files: {(split, id): text}, and those that cannot be used."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, str], str] = {}
        self.rejected: list[Rejected] = []

    def read(self, name: str, content: bytes) -> None:
        split = _parts(name)[0]
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            where = f"{posixpath.basename(name)} line {number}"
            try:
                id, _, text = line.decode("utf-8").strip().partition(" ")
            except UnicodeDecodeError as error:
                self.rejected.append(Rejected(where, "bad_transcript_line", str(error)))
                continue
            if (split, id) in self.lines:
                self.rejected.append(Rejected(id, "duplicate_id", f"{where}: {text}"))
            else:
                self.lines[split, id] = text


def _parts(name: str) -> tuple[str, str, str]:
    """(split, reader, file name without its ending) of .../SUBSET/READER/CHAPTER/FILE."""
    *_, subset, reader, _, file = ["", "", "", *Path(name).parts]
    stem, ending = os.path.splitext(file)
    return subset.replace("-", "_"), reader, stem if ending.lower() in AUDIO_ENDINGS else file


def detect(path: Path) -> bool:
    """Whether this looks like LibriSpeech, unpacked or packed."""
    if is_archive(path):
        return any(name.endswith(_TRANSCRIPTS) for name in _first_names(path))
    try:
        root, archives, _ = _find(path)
    except (UserError, OSError):
        return False
    return root is not None or detect(archives[0])


def _first_names(archive: Path, number: int = 200) -> list[str]:
    names = []
    try:
        for name, _ in archive_files(archive, lambda name: False):
            names.append(name)
            if len(names) >= number:
                break
    except UserError:
        return []
    return names


def open_source(path: Path, options: SourceOptions) -> LibriSpeech:
    """Opens it; raises UserError as `LibriSpeech`, or for another language than English."""
    if options.language not in (None, "en"):
        raise UserError("LibriSpeech is English: leave --language out")
    return LibriSpeech(path)


def _find(path: Path) -> tuple[Path | None, list[Path], int]:
    """(folder below which all is read, or archives; how many archives are left aside)."""
    if is_archive(path):
        return None, [path], 0
    if not path.is_dir():
        raise _not_librispeech(path)
    inner = path / "LibriSpeech"
    root = inner if inner.is_dir() else path
    archives = sorted(p for p in path.iterdir() if is_archive(p))
    subsets = [root] if _is_subset(root) else sorted(filter(_is_subset, root.iterdir()))
    if subsets and archives:
        logging.getLogger(__name__).warning(
            "reading the unpacked subsets (%s) and leaving the archives beside them aside",
            ", ".join(subset.name for subset in subsets),
        )
    if not subsets and not archives:
        raise _not_librispeech(path)
    if not subsets:
        return None, archives, 0
    return root, [], 0 if root == path else len(archives)  # those below it are met on the way


def _is_subset(folder: Path) -> bool:
    """Whether this is a folder such as dev-clean: of readers, who are numbered."""
    if not folder.is_dir() or not valid_split_name(folder.name.replace("-", "_")):
        return False
    return any(_is_reader(child) for child in folder.iterdir())


def _is_reader(folder: Path) -> bool:
    return folder.name.isdigit() and (folder.is_dir() or folder.is_symlink())


def _not_librispeech(path: str | os.PathLike[str]) -> UserError:
    return UserError(
        f"{path} is not LibriSpeech: give the LibriSpeech folder (of subsets such as "
        f"dev-clean/READER/CHAPTER/*{_AUDIO}), its parent, one subset's folder, or its archives "
        f"({', '.join(ARCHIVES)})"
    )
