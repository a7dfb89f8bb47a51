"""Writes down recordings with a trained recogniser.

    fedasr transcribe --model=DIR FILE|FOLDER|- ... [--format=text|json|srt] [--out=FOLDER]
                      [--decoder=beam --lm=FILE.arpa] [--data=DIR] [--longest=40]

The model is a work directory of `fedasr train`, one checkpoint's folder, or a folder of `fedasr
export`. Recordings are files, folders (all recordings in them) or "-" (one recording on the
standard input), of any rate and number of channels. With one recording its text is printed alone;
with several, a line each: the file, a tab, the text. --format=json prints one object a line, with
the words' times; --format=srt subtitles. --out writes a file for each recording instead, named as
the recording is. Recordings longer than --longest seconds are computed in parts, cut where it is
quiet, in bounded memory. What cannot be read is one line on the standard error, and the others go
on. Exit status: 0 when done, 1 if a recording could not be read, 2 for a mistake that the user can
mend.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from fedasr.cli import common, decoding
from fedasr.errors import UserError

FORMATS = {"text": ".txt", "json": ".json", "srt": ".srt"}


def run(files: list[str]) -> int:
    """Transcribes; returns the exit status."""
    values = flags.FLAGS
    if not values.model or not files:
        raise UserError("--model and recordings are needed: fedasr transcribe --model=DIR FILE ...")
    common.configure_devices()
    from fedasr.data.recordings import AUDIO_ENDINGS
    from fedasr.data.windows import audio_files
    from fedasr.training.checkpoint import read_metadata
    from fedasr.training.transcription import load
    from fedasr.training.workdir import recorded_config

    named: list[tuple[str, Any]] = []
    for name in files:
        if name == "-":
            named.append(("-", sys.stdin.buffer.read()))
        else:
            named += [(str(path), path) for path in audio_files([name], AUDIO_ENDINGS)]
    config = recorded_config(read_metadata(values.model).get("config", {}))
    settings = decoding.settings(config.decoding)
    model = load(values.model, decoding=settings, data=values.data, longest=values.longest)
    status = 0
    found = model.transcribe_all(audio for _, audio in named)
    for (name, _), one in zip(named, found, strict=True):
        if isinstance(one, UserError):
            status = common.fail(f"{name}: {one}", common.FAILED)
        elif values.out:
            _write(Path(values.out), name, _formatted(one, name, alone=True))
        else:
            sys.stdout.write(_formatted(one, name, len(named) == 1))
    return status


def _formatted(transcript: Any, name: str, alone: bool) -> str:
    """A transcript as --format wants it, lines ended."""
    from fedasr.text.subtitles import srt

    if flags.FLAGS.format == "srt":
        text = srt(transcript.words)
        return text if alone else f"{name}\n{text}"
    if flags.FLAGS.format == "json":
        words = [word._asdict() for word in transcript.words]
        row = {"file": name, "text": transcript.text, "seconds": transcript.seconds, "words": words}
        return json.dumps(row, ensure_ascii=False) + "\n"
    return transcript.text + "\n" if alone else f"{name}\t{transcript.text}\n"


def _write(folder: Path, name: str, text: str) -> None:
    """Writes a file beside which no other of that name is overwritten silently."""
    stem = "stdin" if name == "-" else Path(name).name
    path = folder / (stem + FORMATS[flags.FLAGS.format])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"--out: {path} is there already: choose another folder") from error
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {error.strerror}") from error


def _define_flags() -> None:
    flags.DEFINE_string("model", None, "A work directory, a checkpoint or an exported folder.")
    flags.DEFINE_enum("format", "text", list(FORMATS), "Of what is written.")
    flags.DEFINE_string("out", None, "Folder for a file a recording; default: standard output.")
    flags.DEFINE_string("data", None, "The prepared corpus, for from_SPLIT and subwords.")
    flags.DEFINE_float("longest", 40.0, "Seconds that are computed at once.")
    decoding.define_flags()


def main() -> None:
    """The command `fedasr transcribe`: parses the flags, runs and exits."""
    _define_flags()
    common.main(run, __name__, arguments=True, urls=["model"])


if __name__ == "__main__":
    main()
