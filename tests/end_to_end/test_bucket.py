"""A work directory in S3, emulated by moto: killed, stopped, in use, read from elsewhere."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fedasr.errors import UserError
from fedasr.training import dry_run
from fedasr.training.checkpoint import restore_params
from fedasr.training.config import default_config
from fedasr.training.remote import copies
from fedasr.training.remote.storage import Storage

pytest.importorskip("s3fs", reason="s3:// needs s3fs")
pytest.importorskip("moto", reason="the emulated S3 is moto's")

LONGEST = 300.0  # seconds that a process may take


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The URL of a bucket, for this process and those that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("FEDASR_CACHE", str(tmp_path / "cache"))
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the endpoint of an earlier test
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                Storage("s3://speech")._fs.mkdir("speech")
                break
            except Exception:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.2)
        yield "s3://speech"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_run_in_a_bucket_survives_kills(
    finished, tiny_flags, corpus_dir, program_environment, program, bucket, tmp_path
):
    url, rng = f"{bucket}/runs/tiny", random.Random(0)
    command = [sys.executable, "-m", "experiments.train", *tiny_flags, f"--workdir={url}", "--json"]

    def start():
        environment = program_environment | {k: v for k, v in os.environ.items() if "AWS" in k}
        environment["FEDASR_CACHE"] = os.environ["FEDASR_CACHE"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **streams)

    for end in ("SIGKILL", "SIGKILL", "SIGTERM"):
        before = Storage(url).sizes().keys()
        process, deadline = start(), time.monotonic() + LONGEST
        while process.poll() is None and time.monotonic() < deadline:
            if any("checkpoints/" in name for name in Storage(url).sizes().keys() - before):
                break
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(getattr(signal, end))
        output, errors = process.communicate(timeout=LONGEST)
        assert process.returncode == (-9 if end == "SIGKILL" else 3), errors
        assert "Traceback" not in errors
    process = start()
    deadline = time.monotonic() + LONGEST
    while ".owner" not in Storage(url).sizes() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = program("experiments.train", *tiny_flags, f"--workdir={url}")
    assert second.returncode == 2 and "in use by another process" in second.stderr
    output, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    summary, whole = json.loads(output.splitlines()[-1]), json.loads(finished[1])
    assert summary["wer"] == whole["wer"]
    copies.refresh()
    jax.tree.map(np.testing.assert_array_equal, restore_params(url), restore_params(finished[0]))
    there = Storage(url).sizes()
    assert "report.html" in there and ".owner" not in there
    assert copies.leftovers(list(there)) == []

    flags = [f"--checkpoint={url}", f"--data={corpus_dir}", "--json"]
    done = program("experiments.evaluate", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["wer"] == whole["wer"]["test"]
    dry = program("experiments.train", *tiny_flags, "--dry_run", f"--workdir={url}", "--json")
    assert dry.returncode == 0, dry.stderr
    left = {*os.listdir(tmp_path / "cache" / "remote")} - {".compile-cache"}
    assert left == {copies.local(url).name}  # what this process reads


def test_a_bucket_that_is_not_there_is_one_line(program, tiny_flags, bucket):
    url = "s3://none-of-mine/run"
    done = program("experiments.train", *tiny_flags, f"--workdir={url}")
    assert done.returncode == 2 and f"{url} cannot be" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match=f"{url} cannot be listed: .* does not exist"):
        dry_run.dry_run(default_config().to_dict(), url)
