"""Feeds malformed speech to everything that reads speech: nothing may crash, or change silently.

    python -m experiments.fuzz_data --inputs=10000 --seed=0

An input is a recording, a line, a table, a folder or an archive that was good, and then cut,
joined, shifted or changed. It must be refused with a reason, or give what it gave before. What
carries no redundancy is left out: the samples of PCM, the words of a transcript, the few header
fields that no other field contradicts. Exit status: 0, or 1 where an input was mishandled, with the
number that makes it again (`--only`).
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from fedasr.cli import common
from fedasr.data.recordings import read_audio
from fedasr.data.sources import find_layout
from fedasr.data.sources.manifest import read_manifest
from fedasr.data.utterances import Rejected, Utterance
from fedasr.errors import UserError

_INPUTS = flags.DEFINE_integer("inputs", 1000, "How many malformed inputs to make.")
_SEED = flags.DEFINE_integer("seed", 0, "Of all that is made.")
_ONLY = flags.DEFINE_integer("only", None, "Make only the input of this number.")

RATE = 16000
# Format and subtype of libsndfile: up to where a changed byte must be noticed, and whether the
# samples have a checksum. AIFF and AU say their rate, channels and coding once, in the header.
FORMATS = {
    "WAV": ("PCM_16", 44, False),
    "FLAC": ("PCM_16", None, True),
    "OGG": ("VORBIS", None, True),
    "AIFF": ("PCM_16", 0, False),
    "AU": ("PCM_16", 0, False),
    "CAF": ("PCM_16", 0, False),
    "MP3": ("MPEG_LAYER_III", 0, False),
}


class Mishandled(Exception):
    """An input that was neither refused nor read right."""


@functools.cache
def recording(kind: str, number: int) -> bytes:
    """A good recording of half a second."""
    import soundfile

    rng = np.random.default_rng(number)
    time = np.arange(RATE // 2 + 100 * number) / RATE
    sound = 0.3 * np.sin(2 * np.pi * (300 + 50 * number) * time) + rng.normal(0, 0.02, len(time))
    content = io.BytesIO()
    rate = 24000 if kind == "MP3" else RATE
    soundfile.write(content, sound, rate, format=kind, subtype=FORMATS[kind][0])
    return content.getvalue()


@functools.cache
def decoded(kind: str, number: int) -> tuple[np.ndarray, int]:
    """What it decodes to."""
    audio, rate, _ = read_audio(recording(kind, number))
    return audio, rate


def changed(content: bytes, rng: random.Random, start: int = 0) -> tuple[bytes, str]:
    """(content with a change at or after a place, what the change is)."""
    kind = rng.choice(("cut", "flip", "zero", "remove", "insert", "repeat", "tail"))
    size = len(content)
    at = rng.randrange(start, size)
    length = min(rng.choice((1, 2, 4, 16, 100, 1000)), size - at)
    if kind == "cut":
        return content[:at], kind
    if kind == "flip":
        flipped = bytearray(content)
        for place in (at, *(rng.randrange(start, size) for _ in range(rng.choice((0, 0, 3))))):
            flipped[place] ^= 1 << rng.randrange(8)
        return bytes(flipped), kind
    if kind == "zero":
        return content[:at] + bytes(length) + content[at + length :], kind
    if kind == "remove":
        return content[:at] + content[at + length :], kind
    if kind == "insert":
        return content[:at] + rng.randbytes(length) + content[at:], kind
    if kind == "repeat":
        return content[: at + length] + content[at:], kind
    return content + rng.randbytes(length), kind


def audio_input(rng: random.Random) -> str:
    """A recording that was changed, or two in one file."""
    kind = rng.choice(tuple(FORMATS))
    number = rng.randrange(4)
    good, (samples, rate) = recording(kind, number), decoded(kind, number)
    _, checked, has_sum = FORMATS[kind]
    expected = [samples.shape]
    if rng.random() < 0.1:
        other = rng.randrange(4)
        content, how = good + recording(kind, other), "join"
        expected = [(len(samples) + len(decoded(kind, other)[0]),)]
        has_sum = False
    else:
        # Where header fields contradict nothing, changes begin behind them.
        start = 80 if checked == 0 and kind != "MP3" else 0
        if kind == "CAF":
            start = 4096
        content, how = changed(good, rng, min(start, len(good) - 1))
    try:
        audio, found_rate, _ = read_audio(content)
    except UserError:
        raise
    except ValueError:
        return f"audio refused ({how})"
    slack = 6 * 1152 if kind == "MP3" else 0
    if kind == "MP3" and how != "join":
        slack = 2 * 1152  # the encoder's padding, where its header was hit
    if found_rate != rate or abs(len(audio) - expected[0][0]) > slack or audio.ndim != samples.ndim:
        raise Mishandled(
            f"{kind} {how}: {audio.shape} at {found_rate} Hz instead of {expected[0]} at {rate}"
        )
    if has_sum and not np.array_equal(audio, samples):
        raise Mishandled(f"{kind} {how}: other samples")
    return "audio as it was"


_LINES = (
    {"audio_filepath": "a.wav", "text": "turn on the light", "user": "anna"},
    {"audio_filepath": "b/ü.wav", "text": "Grüße", "user": "bö", "split": "dev", "id": "x"},
    {"audio_filepath": "c.flac", "text": "", "speaker": 7, "offset": 1.5, "duration": 2},
    {"audio_filepath": "d.mp3", "text": "so", "client_id": "c", "start": 1, "end": 2, "age": 3},
)


def manifest_input(rng: random.Random, folder: Path) -> str:
    """Lines of a manifest, some of them changed."""
    lines = []
    for _ in range(rng.randrange(1, 6)):
        line = json.dumps(rng.choice(_LINES), ensure_ascii=rng.random() < 0.5).encode()
        lines.append(changed(line, rng)[0] if rng.random() < 0.7 else line)
    content = b"\n".join(lines) + b"\n"
    path = folder / "m.jsonl"
    path.write_bytes(content)
    try:
        items = list(read_manifest(path))
    except UserError as error:
        _one_line(error)
        return "manifest refused"
    if content.lstrip().startswith(b"[") or _may_be_table(content):
        return "manifest taken for an array or a table"
    there = [x for x in content.split(b"\n") if x.strip(b" \t\r\n\xef\xbb\xbf")]
    if len(items) != len(there):
        raise Mishandled(f"{len(items)} items of {len(there)} lines: {content!r}")
    for line, item in zip(there, items, strict=True):
        if isinstance(item, Rejected):
            continue
        entry = json.loads(line.decode("utf-8-sig"))
        user = next(entry[k] for k in ("user", "speaker", "speaker_id", "client_id") if k in entry)
        keys = ("text", "sentence", "transcript", "transcription")
        text = next(entry[k] for k in keys if k in entry)
        if (item.text, item.user) != (text, str(user)):
            raise Mishandled(f"{item} of {line!r}")
    return "manifest counted line by line"


def _may_be_table(content: bytes) -> bool:
    return not content.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{")


def table_input(rng: random.Random, folder: Path) -> str:
    """A CSV or TSV that was changed."""
    separator = rng.choice((",", "\t", ";"))
    rows = [["audio_filepath", "text", "user", "split"]]
    for i in range(rng.randrange(1, 6)):
        quoted = '"one, two; three"' if separator != "\t" else "one two"
        rows.append([f"{i}.wav", rng.choice((quoted, "so", "Grüße")), f"u{i % 2}", "train"])
    content = "\n".join(separator.join(row) for row in rows).encode() + b"\n"
    content, _ = changed(content, rng)
    path = folder / "m.csv"
    path.write_bytes(content)
    try:
        items = list(read_manifest(path))
    except UserError as error:
        _one_line(error)
        return "table refused"
    text = content.removeprefix(b"\xef\xbb\xbf")
    if text.lstrip().startswith((b"{", b"[")) or text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "table of another form"
    there = [x for x in text.split(b"\n") if x.strip(b" \t\r\n")]
    if len(items) < len(there) - 1:
        raise Mishandled(f"{len(items)} items of {len(there) - 1} lines: {content!r}")
    return "table counted line by line"


def _archive(compressed: bool) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz" if compressed else "w") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for reader in ("84", "174"):
            folder = f"LibriSpeech/dev-clean/{reader}/1"
            names = [f"{reader}-1-{i:04d}" for i in range(2)]
            for i, name in enumerate(names):
                add(f"{folder}/{name}.flac", recording("FLAC", i))
            text = "".join(f"{name} GOOD DAY\n" for name in names)
            add(f"{folder}/{reader}-1.trans.txt", text.encode())
    return made.getvalue()


_ARCHIVES: dict[bool, bytes] = {}


def archive_input(rng: random.Random, folder: Path) -> str:
    """An archive of LibriSpeech that was changed."""
    compressed = rng.random() < 0.5
    if compressed not in _ARCHIVES:
        _ARCHIVES[compressed] = _archive(compressed)
    content, how = changed(_ARCHIVES[compressed], rng)
    path = folder / ("a.tar.gz" if compressed else "a.tar")
    path.write_bytes(content)
    try:
        items = list(find_layout("librispeech").open(path))
    except UserError as error:
        _one_line(error)
        return "archive refused"
    right = refused = 0
    for item in items:
        if isinstance(item, Rejected):
            refused += 1
            continue
        number = int(item.id[-1])
        try:
            audio = item.audio()[0]
        except UserError:
            raise
        except ValueError:
            refused += 1
            continue
        if not np.array_equal(audio, decoded("FLAC", number)[0]):
            raise Mishandled(f"archive {how}: other samples of {item.id}")
        right += 1
    if right + refused < 4:
        raise Mishandled(f"archive {how}: {right} right and {refused} refused of 4")
    return "archive counted"


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _layouts() -> dict[str, dict[str, bytes]]:
    """The files of small corpora by layout; those that are changed are text or tables."""
    cut = {
        "id": "c",
        "start": 0,
        "duration": 0.4,
        "type": "MonoCut",
        "supervisions": [{"id": "s", "start": 0, "duration": 0.4, "text": "hi", "speaker": "u"}],
        "recording": {
            "id": "r",
            "duration": 0.5,
            "sources": [{"type": "file", "channels": [0], "source": "a.wav"}],
        },
    }
    wav = {"a.wav": recording("WAV", 0)}
    row = "u\ta.wav\tso\ten\n"
    made = {
        "kaldi": {
            "wav.scp": b"a a.wav\nb a.wav\n",
            "segments": b"u-1 a 0.0 0.2\nu-2 b 0.2 0.4\n",
            "text": b"u-1 hi\nu-2 good day\n",
            "utt2spk": b"u-1 u\nu-2 u\n",
        },
        "tedlium": {"train/a.stm": b"a 1 u 0.0 0.2 <o,f0,male> hi\na 1 u 0.2 0.4 <o> so\n"},
        "lhotse": {"cuts.jsonl.gz": gzip.compress((json.dumps(cut) + "\n").encode() * 2, mtime=0)},
        "common_voice": {"en/train.tsv": f"client_id\tpath\tsentence\tlocale\n{row}".encode()},
        "librispeech": {"s/8/1/8-1.trans.txt": b"8-1-0 HI\n8-1-1 SO\n"},
        "huggingface": {"train/metadata.csv": b"file_name,text,speaker\na.wav,hi,u\n"},
    }
    places = {
        "tedlium": "train/a.wav",
        "common_voice": "en/clips/a.wav",
        "librispeech": "s/8/1/8-1-0.wav",
        "huggingface": "train/a.wav",
    }
    found = {
        name: {**files, places.get(name, "a.wav"): wav["a.wav"]} for name, files in made.items()
    }
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        rows = [{"audio": {"bytes": wav["a.wav"], "path": None}, "text": "hi", "speaker": 1}] * 3
        content = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), content)
        found["huggingface parquet"] = {"train-00000-of-00001.parquet": content.getvalue()}
    return found


_LAYOUTS: dict[str, dict[str, bytes]] = {}


def layout_input(rng: random.Random, folder: Path) -> str:
    """A folder of some layout, one of whose lists was changed."""
    if not _LAYOUTS:
        _LAYOUTS.update(_layouts())
    name = rng.choice(tuple(_LAYOUTS))
    files = dict(_LAYOUTS[name])
    list_name = rng.choice([x for x in files if not x.endswith(".wav")])
    files[list_name], _ = changed(files[list_name], rng)
    _write(folder, files)
    try:
        source = find_layout(name.split()[0]).open(folder)
        items = list(source)
    except UserError as error:
        _one_line(error)
        return f"{name} refused"
    if len(items) != source.total:
        raise Mishandled(f"{name}: {len(items)} items, {source.total} announced")
    for item in items:
        if isinstance(item, Utterance):
            try:
                item.audio()
            except UserError:
                raise
            except (ValueError, RuntimeError, OSError):
                continue
    return f"{name} read"


def _one_line(error: UserError) -> None:
    if "\n" in str(error) or not str(error):
        raise Mishandled(f"not one line: {error!r}")


KINDS: tuple[tuple[float, Callable[..., str], bool], ...] = (
    (0.55, audio_input, False),
    (0.15, manifest_input, True),
    (0.1, table_input, True),
    (0.1, archive_input, True),
    (0.1, layout_input, True),
)


def fuzz(numbers: range, seed: int) -> dict[str, Any]:
    """Makes these inputs; returns {"outcomes": {what became of them: count}, "mishandled": {...}}.

    An input is a function of the seed and its number.
    """
    outcomes: Counter[str] = Counter()
    mishandled: dict[int, str] = {}
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        (_, make, needs_folder), *_ = rng.choices(KINDS, [share for share, _, _ in KINDS])
        try:
            if needs_folder:
                with tempfile.TemporaryDirectory() as folder:
                    outcomes[make(rng, Path(folder))] += 1
            else:
                outcomes[make(rng)] += 1
        except Mishandled as error:
            mishandled[number] = f"{make.__name__}: {error}"
        except Exception as error:
            mishandled[number] = f"{make.__name__}: crash: {type(error).__name__}: {error}"
    return {"outcomes": dict(sorted(outcomes.items())), "mishandled": mishandled}


def program() -> int:
    """Prints what became of the inputs."""
    numbers = range(_INPUTS.value)
    if _ONLY.value is not None:
        numbers = range(_ONLY.value, _ONLY.value + 1)
    found = fuzz(numbers, _SEED.value)
    if common.JSON.value:
        common.show({"inputs": len(numbers), "seed": _SEED.value, **found})
    else:
        for outcome, count in found["outcomes"].items():
            print(f"{outcome}: {count}")
        print(f"mishandled: {len(found['mishandled'])} of {len(numbers)}")
        for number, why in list(found["mishandled"].items())[:20]:
            print(f"  --only={number} --seed={_SEED.value}: {' '.join(why.split())[:300]}")
    return common.FAILED if found["mishandled"] else 0


if __name__ == "__main__":
    common.main(program)
