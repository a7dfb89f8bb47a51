"""What is decoded is what the file holds, compared with ffmpeg; or the file is refused."""

import itertools
import shutil
import struct
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.containers import Unusable, examine, mpeg
from fedasr.data.recordings import Mismatch, Recording, read_audio

soundfile = pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")

CODECS = {  # ending: (options of ffmpeg, what becomes of two files one after the other)
    "s16.wav": ("-c:a pcm_s16le -f wav", "refused"),
    "s24.wav": ("-c:a pcm_s24le -f wav", "refused"),
    "f32.wav": ("-c:a pcm_f32le -f wav", "refused"),
    "alaw.wav": ("-c:a pcm_alaw -f wav", "refused"),
    "adpcm.wav": ("-c:a adpcm_ima_wav -f wav", "refused"),
    "rf64.wav": ("-c:a pcm_s16le -rf64 always -f wav", "refused"),
    "flac": ("-c:a flac -f flac", "refused"),
    "aiff": ("-c:a pcm_s16be -f aiff", "refused"),
    "aifc": ("-c:a pcm_s16le -f aiff", "refused"),
    "au": ("-c:a pcm_s16be -f au", "refused"),
    "caf": ("-c:a pcm_s16be -f caf", "refused"),
    "w64": ("-c:a pcm_s16le -f w64", "refused"),
    "cbr.mp3": ("-c:a libmp3lame -b:a 32k -f mp3", "joined"),
    "vbr.mp3": ("-c:a libmp3lame -q:a 9 -f mp3", "joined"),
    "bare.mp3": ("-c:a libmp3lame -write_xing 0 -f mp3", "joined"),
    "vorbis.ogg": ("-c:a libvorbis -f ogg", "joined"),
    "opus.ogg": ("-c:a libopus -f ogg", "joined"),
}
NO_LENGTH = {"adpcm.wav", "s16.wav", "s24.wav", "f32.wav", "alaw.wav", "rf64.wav", "aiff", "aifc"}
NO_LENGTH |= {"au", "caf", "w64"}
GRID = [
    (codec, rate, channels)
    for codec, rate, channels in itertools.product(CODECS, (8000, 22050, 48000), (1, 2))
    if codec != "opus.ogg" or rate != 22050
]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two recordings in every format, rate and number of channels: whole, and as pipes write."""
    if not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg: apt-get install ffmpeg")
    folder = tmp_path_factory.mktemp("grid")
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 1.7), ("b", 0.9)):
        time = np.arange(int(seconds * 48000)) / 48000
        sound = 0.3 * np.sin(2 * np.pi * 440 * time) * np.sin(2 * np.pi * 3 * time)
        sound[: len(sound) // 3] += 0.2 * rng.standard_normal(len(sound) // 3)  # for VBR
        sound[-len(sound) // 4 :] = 0
        soundfile.write(folder / f"{name}.flac", sound, 48000)
    for name, how in (("a", "whole"), ("a", "piped"), ("b", "second")):
        command = ["ffmpeg", "-y", "-v", "error", "-i", str(folder / f"{name}.flac")]
        for codec, rate, channels in GRID:
            command += [*CODECS[codec][0].split(), "-ar", str(rate), "-ac", str(channels)]
            command += ["-seekable", "0"] if how == "piped" else []
            command.append(str(folder / f"{how}-{rate}-{channels}.{codec}"))
        subprocess.run(command, check=True)
    return folder


def ffmpeg_seconds(folder, names):
    """What ffmpeg decodes of each file, in one call."""
    command = ["ffmpeg", "-y", "-v", "error"]
    for name in names:
        command += ["-i", str(folder / name)]
    for i, name in enumerate(names):
        out = str(folder / f"{name}.raw")
        command += ["-map", f"{i}:a", "-f", "s16le", "-ar", "16000", "-ac", "1", out]
    subprocess.run(command, check=True)
    return [(folder / f"{name}.raw").stat().st_size / 32000 for name in names]


def seconds(path):
    audio, rate, _ = read_audio(path)
    return len(audio) / rate


@pytest.mark.parametrize("codec", CODECS)
def test_durations_are_those_of_ffmpeg_or_the_file_is_refused(grid, codec):
    kinds = [(rate, channels) for name, rate, channels in GRID if name == codec]
    whole = [f"whole-{rate}-{channels}.{codec}" for rate, channels in kinds]
    for name, expected in zip(whole, ffmpeg_seconds(grid, whole), strict=True):
        bare = 0.07 if codec == "bare.mp3" else 0.001  # ffmpeg keeps the decoder's delay
        assert seconds(grid / name) == pytest.approx(expected, abs=bare), name
        # ffmpeg itself does not read what it wrote to pipes in some of these formats.
        piped = name.replace("whole", "piped")
        slack = 0.15 if codec.endswith("mp3") else 0.001  # without the encoder's own padding
        assert seconds(grid / piped) == pytest.approx(expected, abs=slack), piped
        content = (grid / name).read_bytes()
        (grid / "cut").write_bytes(content[: len(content) * 6 // 10])
        with pytest.raises(Unusable, match="truncated"):
            read_audio(grid / "cut")
    joined = []
    for name in whole:
        second = (grid / name.replace("whole", "second")).read_bytes()
        for how in ("whole", "piped"):
            name = name.replace("whole", how)
            (grid / f"joined-{name}").write_bytes((grid / name).read_bytes() + second)
            joined.append(f"joined-{name}")
    if CODECS[codec][1] == "refused":
        for name in joined:
            with pytest.raises(Unusable, match="several recordings"):
                read_audio(grid / name)
    else:
        for name, expected in zip(joined, ffmpeg_seconds(grid, joined), strict=True):
            assert seconds(grid / name) == pytest.approx(expected, abs=0.1), name


@pytest.mark.parametrize("codec", ["cbr.mp3", "vbr.mp3", "bare.mp3"])
def test_no_sound_is_lost_of_mp3_without_a_header(grid, codec):
    """Beside the length, the samples: ffmpeg's, but for the decoder's delay."""
    path = grid / f"piped-22050-1.{codec}"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-"]
    theirs = np.frombuffer(subprocess.run(command, capture_output=True).stdout, np.float32)
    ours = read_audio(path).samples
    delay = len(theirs) - len(ours)
    assert 0 <= delay <= 529
    assert np.corrcoef(ours, theirs[delay:])[0, 1] > 0.999


@pytest.mark.parametrize("codec", [c for c in CODECS if c not in NO_LENGTH])
def test_every_cut_is_seen(grid, codec):
    """Except between two MPEG frames without a count, where nothing says that more was there."""
    content = (grid / f"whole-22050-1.{codec}").read_bytes() if codec != "opus.ogg" else None
    content = content or (grid / f"whole-8000-1.{codec}").read_bytes()
    whole = seconds_of(content)
    for length in np.linspace(1, len(content) - 1, 60).astype(int):
        try:
            found = seconds_of(content[:length])
        except Unusable:
            continue
        assert codec == "bare.mp3" and found < whole


def seconds_of(content):
    audio, rate, _ = read_audio(content)
    return len(audio) / rate


@pytest.mark.parametrize("codec", ["s16.wav", "flac", "aiff", "vorbis.ogg", "opus.ogg"])
def test_a_changed_byte_changes_no_length_silently(grid, codec):
    content = (grid / f"whole-8000-1.{codec}").read_bytes()
    whole = read_audio(content).samples
    rng = np.random.default_rng(0)
    for at in [*range(0, 60), *rng.integers(60, len(content), 100)]:
        changed = bytearray(content)
        changed[at] ^= 1 << rng.integers(8)
        try:
            audio, rate, _ = read_audio(bytes(changed))
        except Unusable:
            continue
        assert audio.shape == whole.shape, at
        assert codec == "aiff" or rate == 8000, at  # which says its rate once


# ---------------------------------------------------------------------------- without ffmpeg


def wav(samples, data_size=None, riff_size=None, rate=16000, extra=b""):
    sound = np.asarray(samples, "<i2").tobytes()
    size = len(sound) if data_size is None else data_size
    head = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVEfmt " + head + b"data" + struct.pack("<I", size) + sound + extra
    return b"RIFF" + struct.pack("<I", len(body) if riff_size is None else riff_size) + body


UNKNOWN = st.sampled_from([0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0x7F000000])


@given(size=UNKNOWN, samples=st.integers(1, 3000), channels=st.just(1))
@settings(max_examples=30, deadline=None)
def test_sizes_that_pipes_leave_open_are_those_of_the_file(size, samples, channels):
    values = np.arange(samples)
    for riff in (size, 0):
        audio, rate, _ = read_audio(wav(values, size, riff))
        np.testing.assert_array_equal(audio, values / np.float32(32768))
        assert rate == 16000
    audio = read_audio(wav(values, 0, 0)).samples
    np.testing.assert_array_equal(audio, values / np.float32(32768))


@given(data=st.data(), samples=st.integers(2, 500))
@settings(max_examples=60, deadline=None)
def test_a_wav_file_is_whole_or_refused(data, samples):
    content = wav(np.arange(samples))
    with pytest.raises(Unusable):
        examine(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(Unusable, match="several recordings"):
        examine(content + content)
    junk = data.draw(st.binary(min_size=9, max_size=40))
    if junk.strip(b"\0") and not all(32 <= c < 127 for c in junk[:4]):
        with pytest.raises(Unusable, match="belong to no chunk"):
            examine(content + junk)
    listed = wav(np.arange(samples), extra=b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert len(read_audio(listed).samples) == samples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\0\0\0\x20ftypM4A " + bytes(40), "AAC or ALAC in an MP4 file"),
        (b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(40), r"AAC \(ADTS\)"),
        (b"\x1aE\xdf\xa3" + bytes(40), "WebM"),
        (b"<!DOCTYPE html><title>404</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(40), "ZIP archive"),
        (bytes(4000), "nothing but zero bytes"),
        (b"this is no audio", "no format that is read"),
        (b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\n", "sph2pipe"),
        (b"RIFF\x10\0\0\0AVI LIST", "not of sound"),
    ],
)
def test_what_is_no_recording_is_named(tmp_path, content, message):
    path = tmp_path / "clip.mp3"
    path.write_bytes(content)
    with pytest.raises(Unusable, match=message) as error:
        read_audio(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 28])
def test_sound_that_begins_behind_its_end_is_refused(size):
    common = struct.pack(">hIh10s", 1, 10, 16, bytes.fromhex("400cfa00000000000000"))
    content = b"FORM" + struct.pack(">I", 0) + b"AIFFCOMM" + struct.pack(">I", 18) + common
    content += b"SSND" + struct.pack(">III", size, 1000, 0) + bytes(20)
    with pytest.raises(Unusable, match="AIFF: its sound begins behind its end"):
        examine(content)


def mpeg_frames(number, rate_bits=0x50, fill=0):
    """Frames of silence: MPEG 2 layer III, 24 kbit/s, 24 kHz by default."""
    head = bytes((0xFF, 0xF3, 0x30 | (rate_bits >> 4 & 0x0C), 0xC4))
    size = mpeg.frame_header(head, 0).size
    return (head + bytes(size - 4)) * number


def test_frames_of_mpeg_are_counted_one_by_one():
    content = mpeg_frames(50)
    found = examine(content)
    assert found.frames == 50 * 576 and found.mpeg
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + content + b"TAG" + bytes(125)
    assert examine(tagged).frames == 50 * 576
    assert examine(content + tagged).frames == 100 * 576  # a tag between the two
    with pytest.raises(Unusable, match="truncated"):
        examine(content[:-1])
    with pytest.raises(Unusable, match="no frame"):
        examine(content[:1000] + b"lost" + content[1000:])
    with pytest.raises(Unusable, match="rate or its channels change"):
        examine(content + mpeg_frames(2, rate_bits=0x80))


def test_chatter_of_decoders_is_caught_and_damage_said(capfd):
    content = bytearray(mpeg_frames(40))
    for at in range(400, 1400, 7):
        content[at] |= 0x5A  # side information that makes no sense
    try:
        decoded = read_audio(bytes(content))
        assert decoded.complaints >= 0
    except Unusable as error:
        assert "damaged" in str(error)
    assert capfd.readouterr().err == ""


@given(
    start=st.floats(0, 1.9), length=st.floats(0.01, 2), rate=st.sampled_from([8000, 22050, 16000])
)
@settings(max_examples=40, deadline=None)
def test_parts_are_cut_exactly(start, length, rate, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"ramp-{rate}.wav"
    if not path.exists():
        soundfile.write(path, np.arange(2 * rate, dtype=np.int32) << 8, rate, subtype="PCM_24")
    part = Recording(str(path), start, start + length)
    if start + length > 2.1:
        with pytest.raises(Mismatch):
            part()
        return
    samples, found, _ = part()
    expected = np.arange(2 * rate)[round(start * rate) : round((start + length) * rate)]
    np.testing.assert_array_equal(samples * 2**23, expected)
    assert found == rate


def test_stated_durations_are_checked(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((16000, 2)), 16000)
    for stated in (None, 0.91, 1.0, 1.09):
        assert len(Recording(str(tmp_path / "a.wav"), stated=stated)().samples) == 16000
    for stated in (0.89, 1.11, 60):
        with pytest.raises(Mismatch, match="stated"):
            Recording(str(tmp_path / "a.wav"), stated=stated)()
    assert Recording(str(tmp_path / "a.wav"), channel=1)().samples.shape == (16000,)
    with pytest.raises(Mismatch, match="channel 2 of 2"):
        Recording(str(tmp_path / "a.wav"), channel=2)()
    with pytest.raises(Mismatch):
        Recording(str(tmp_path / "a.wav"), start=1.0)()
