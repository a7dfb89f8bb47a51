"""A tiny prepared corpus of noise, and the programs under experiments/ as subprocesses."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 500.0  # seconds that a program may take
TINY_MODEL = (
    "--config.model.options.dim=16",
    "--config.model.options.blocks=1",
    "--config.model.options.heads=2",
    "--config.model.options.mlp=16",
)
TINY_RUN = (
    *TINY_MODEL,
    "--config.cohort=3",
    "--config.client.steps=2",
    "--config.client.batch_size=2",
    "--config.seed_training.batch_size=4",
    "--config.seed_training.steps=4",
    "--config.rounds=6",
    "--config.evaluation.every=3",
    "--config.checkpoint.every=2",
    "--config.checkpoint.seed_every=2",
)


def write_recordings(folder: Path) -> None:
    """Half-second recordings of noise in four splits, and `speech.jsonl` that lists them."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")
    rng = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five"]
    lines = []
    for split, users in {"seed": 2, "train": 6, "dev": 2, "test": 2}.items():
        for user in range(users):
            for i in range(3):
                name = f"{split}-{user}-{i}.wav"
                samples = 0.1 * rng.standard_normal(int(16_000 * rng.uniform(0.4, 0.6)))
                soundfile.write(folder / name, samples, 16_000)
                lines.append(
                    {
                        "audio_filepath": name,
                        "text": " ".join(rng.choice(words, 2)),
                        "user": f"{split} {user}",
                        "split": split,
                    }
                )
    manifest = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "speech.jsonl").write_text(manifest)


def environment() -> dict[str, str]:
    """Of a subprocess that imports this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


class Launcher:
    """Runs programs, each in a process of its own; they share the time that imports take."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def __call__(
        self, module: str, *flags: object, cwd: Path | None = None
    ) -> subprocess.CompletedProcess:
        """Runs `python -m module flags...` to its end."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("forks.py")],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        arguments = list(map(str, flags))
        files = [self._folder / name for name in ("stdout", "stderr")]
        for file in files:
            file.write_bytes(b"")
        request = {
            "module": module,
            "arguments": arguments,
            "folder": str(cwd or ROOT),
            "environment": environment(),
            "stdout": str(files[0]),
            "stderr": str(files[1]),
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], LONGEST)[0]:
            self.close()
            raise TimeoutError(f"{module} {' '.join(arguments)}: {files[1].read_text()}")
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"the process that {module} is forked from has ended")
        status = int(answer)
        output, errors = (file.read_text() for file in files)
        return subprocess.CompletedProcess([module, *arguments], status, output, errors)

    def close(self) -> None:
        """Ends the process that others are forked from, and whatever runs still."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """`Launcher`: (module, *flags, cwd) -> CompletedProcess."""
    launcher = Launcher(tmp_path_factory.mktemp("program"))
    yield launcher
    launcher.close()


@pytest.fixture
def program_environment():
    """The environment that `program` gives now: a test may have changed it."""
    return environment()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): the folder that `make(folder)` fills, made by one xdist worker for all."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def get(name, make):
        folder, ready = shared / name, shared / f"{name}.ready"
        try:
            folder.mkdir()
        except FileExistsError:
            deadline = time.monotonic() + LONGEST
            while not ready.exists():
                assert time.monotonic() < deadline, f"another worker failed to make {name}"
                time.sleep(0.1)
        else:
            make(folder)
            ready.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def recordings(once):
    """The manifest of a tiny corpus of noise."""
    return once("recordings", write_recordings) / "speech.jsonl"


@pytest.fixture(scope="session")
def corpus_dir(recordings, once):
    """The folder of the tiny corpus, prepared: 6 training users, 2 each of seed, dev and test."""
    from fedasr.data.preparation.prepare import prepare
    from fedasr.data.sources.manifest import manifest_fingerprint, read_manifest

    fingerprint, _ = manifest_fingerprint(recordings)
    return once(
        "corpus",
        lambda out: prepare(read_manifest(recordings), out, name="tiny", fingerprint=fingerprint),
    )


@pytest.fixture(scope="session")
def tiny_flags(corpus_dir):
    """Flags of a run of seconds on the tiny corpus."""
    return (f"--config.data.dir={corpus_dir}", *TINY_RUN)


@pytest.fixture(scope="session")
def tiny_model():
    """Flags of a model of 20,000 parameters."""
    return TINY_MODEL


@pytest.fixture(scope="session")
def finished(tiny_flags, once, program):
    """An uninterrupted run: (work directory, its stdout)."""

    def run(folder):
        done = program("experiments.train", *tiny_flags, f"--workdir={folder}/run", "--json")
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)

    folder = once("finished", run)
    return folder / "run", (folder / "stdout").read_text()
