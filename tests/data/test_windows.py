import io
import itertools

import numpy as np
import pytest

from fedasr.audio.features import to_mono_16k
from fedasr.data import windows
from fedasr.data.recordings import read_audio
from fedasr.data.windows import RATE, audio_files, read_blocks
from fedasr.errors import UserError

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")


def speech(seconds, pauses=()):
    """Noise with silences of 0.3 s from each of `pauses` on."""
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.standard_normal(round(seconds * RATE)).astype(np.float32)
    for start in pauses:
        samples[round(start * RATE) : round((start + 0.3) * RATE)] *= 1e-3
    return samples


def blocks_of(samples, size=1.7):
    step = round(size * RATE)
    return (samples[i : i + step] for i in range(0, len(samples), step))


def test_what_is_short_comes_whole():
    samples = speech(2.0)
    (window,) = windows.windows(blocks_of(samples), longest=2.0)
    np.testing.assert_array_equal(window.samples, samples)
    assert (window.first, window.last, window.start) == (0, len(samples), 0.0)
    (empty,) = windows.windows(iter([]))
    assert len(empty.samples) == 0


@pytest.mark.parametrize("context", [0.0, 0.5])
def test_parts_cover_a_long_recording_once_and_are_cut_where_it_is_quiet(context):
    pauses = (1.6, 3.2, 4.9, 6.5)
    samples = speech(8.0, pauses)
    found = list(windows.windows(blocks_of(samples), 2.0, context))
    kept = np.concatenate([w.samples[w.first : w.last] for w in found])
    np.testing.assert_array_equal(kept, samples)
    ends = [w.start + (w.last - w.first) / RATE for w in found]
    for end, pause in zip(ends[:4], pauses, strict=True):
        assert pause < end < pause + 0.3
    for window, end in itertools.pairwise([0.0, *ends]):
        assert end - window <= 2.0
    for number, window in enumerate(found):
        assert len(window.samples) <= (2.0 + 2 * context) * RATE
        begin = round(window.start * RATE) - window.first
        np.testing.assert_array_equal(window.samples, samples[begin : begin + len(window.samples)])
        assert window.first == (round(context * RATE) if number else 0)


def test_memory_is_bounded_by_the_parts():
    """Of an endless recording nothing but a few blocks is ever read ahead."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield speech(1.0)

    for window in itertools.islice(windows.windows(endless(), 3.0, 0.5), 20):
        assert read - (window.start + 3.0) <= 3


def test_samples_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        list(windows.windows(iter([np.float32([0.0, np.nan])])))


def written(samples, rate, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT", **options)
    return file.getvalue()


def test_files_are_read_as_preparation_reads_them(tmp_path):
    stereo = np.stack([speech(1.0), speech(1.0)[::-1]], axis=1)
    content = written(stereo, 8000)
    (tmp_path / "a.wav").write_bytes(content)
    expected = to_mono_16k(read_audio(content).samples, 8000)
    for file in (content, tmp_path / "a.wav"):
        (block,) = read_blocks(file)
        np.testing.assert_array_equal(block, expected)


@pytest.mark.parametrize("rate", [RATE, 8000])
def test_long_files_come_in_blocks_with_the_same_samples(rate, monkeypatch):
    monkeypatch.setattr(windows, "_WHOLE", 0.5)
    monkeypatch.setattr(windows, "_BLOCK", RATE // 4)
    content = written(np.stack([speech(1.1), speech(1.1)], axis=1), rate)
    found = list(read_blocks(content))
    assert len(found) > 2
    whole = to_mono_16k(read_audio(content).samples, rate)
    joined = np.concatenate(found)
    assert joined.shape == whole.shape
    np.testing.assert_allclose(joined, whole, atol=1e-4)


@pytest.mark.parametrize("content", [b"", b"no audio", written(speech(1.0), RATE)[:20_000]])
def test_what_cannot_be_read_is_one_line(content, tmp_path):
    (tmp_path / "broken.wav").write_bytes(content)
    for file in (content, tmp_path / "broken.wav"):
        with pytest.raises(UserError) as caught:
            list(read_blocks(file))
        assert "\n" not in str(caught.value)


def test_files_and_folders(tmp_path):
    for name in ("b.wav", "sub/a.flac", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = audio_files([str(tmp_path), str(tmp_path / "notes.txt")], (".wav", ".flac"))
    assert [path.name for path in found] == ["b.wav", "a.flac", "notes.txt"]
    with pytest.raises(UserError, match="no such file"):
        audio_files([str(tmp_path / "c.wav")], (".wav",))
    with pytest.raises(UserError, match="holds no recordings"):
        audio_files([str(tmp_path / "sub")], (".wav",))
