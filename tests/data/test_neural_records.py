"""CORP's release: TFRecord files, written here by hand."""

import struct

import numpy as np
import pytest

from fedasr.data.neural import NeuralSessions, prepare_sessions
from fedasr.data.neural.tfrecords import rolling_z_scores
from fedasr.data.records import open_corpus, read_metadata
from fedasr.errors import UserError
from fedasr.text import tokenizer_for

tf_example_pb2 = pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2


def crc32c(data):
    """By table, from the polynomial 0x1EDC6F41."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write(path, sentences, **changes):
    """Records of (text, features) as the authors' program writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for text, features in sentences:
            example = tf_example_pb2.Example()
            fields = example.features.feature
            fields["inputFeatures"].float_list.value.extend(features.ravel().tolist())
            codes = [ord(c) for c in text] + [0] * (40 - len(text))
            fields["transcription"].int64_list.value.extend(codes)
            fields["nTimeSteps"].int64_list.value.append(changes.get("bins", len(features)))
            for name in changes.get("drop", ()):
                del fields[name]
            data = example.SerializeToString()
            head = struct.pack("<Q", len(data))
            file.write(head + struct.pack("<I", crc32c(head)))
            file.write(data + struct.pack("<I", crc32c(data)))


def features(count, seed=0, channels=4):
    rng = np.random.default_rng(seed)
    return [rng.normal(3, 2, (40 + i, channels)).astype(np.float32) for i in range(count)]


TEXTS = ["don't>go~", "yes,>i>can", "why?"]


def test_the_check_value_of_crc_32c():
    """RFC 3720: 32 bytes of zeros have 8A9136AA."""
    unmasked = 0x8A9136AA
    assert crc32c(bytes(32)) == ((unmasked >> 15 | unmasked << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_sessions_of_the_seed_model_are_read_as_they_are_stored(tmp_path):
    signals = features(3)
    raw = tmp_path / "tfrecords"
    both = list(zip(TEXTS[:2], signals[:2], strict=True))
    write(raw / "t5.2022.05.18" / "train" / "chunk_0.tfrecord", both)
    write(raw / "t5.2022.05.18" / "test" / "chunk_0.tfrecord", [(TEXTS[2], signals[2])])
    source = NeuralSessions(raw)
    assert source.channels == 4
    summary = prepare_sessions(source, tmp_path / "out", stride=2, labels="handwriting")
    assert summary["skipped"] == {}
    corpus = open_corpus(tmp_path / "out", "train")
    assert list(corpus.users) == ["t5.2022.05.18"]
    found = corpus.get(0, range(2))
    for example, signal in zip(found, signals, strict=False):
        np.testing.assert_array_equal(example["features"], signal)
    tokenizer = tokenizer_for(read_metadata(tmp_path / "out"))
    assert [tokenizer.decode(x["labels"]) for x in found] == ["don't go.", "yes, i can"]
    assert len(open_corpus(tmp_path / "out", "test").get(0, range(1))) == 1


def test_sessions_of_recalibration_are_scaled_by_the_sentences_before(tmp_path):
    signals = features(13)
    write(tmp_path / "raw" / "t5.2022.09.29" / "a.tfrecord", [("yes", x) for x in signals[:7]])
    write(tmp_path / "raw" / "t5.2022.09.29" / "b.tfrecord", [("no", x) for x in signals[7:]])
    summary = prepare_sessions(NeuralSessions(tmp_path / "raw"), tmp_path / "out", stride=2)
    assert list(summary["splits"]) == ["recalibration"]
    found = open_corpus(tmp_path / "out", "recalibration").get(0, range(13))
    for i in (0, 1, 5, 12):
        before = np.concatenate(signals[max(0, i - 10) : i] if i else signals[:1])
        expected = (signals[i] - before.mean(0)) / (before.std(0) + 1e-8)
        np.testing.assert_allclose(found[i]["features"], expected, rtol=1e-4, atol=1e-5)
    dead = [np.ones((5, 2), np.float32), np.arange(10, dtype=np.float32).reshape(5, 2)]
    assert np.abs(rolling_z_scores(dead)[1]).max() == 0  # and not 1e8


def test_areas_of_records(tmp_path):
    signals = features(1)
    write(tmp_path / "s" / "train" / "a.tfrecord", [("yes", signals[0])])
    from fedasr.data.neural import parse_areas

    source = NeuralSessions(tmp_path, parse_areas("features[1:3]"))
    (only,) = list(source)
    np.testing.assert_array_equal(only.audio()[0], signals[0][:, 1:3])
    with pytest.raises(UserError, match="features\\[0:192\\]"):
        NeuralSessions(tmp_path, parse_areas("tx1[0:3]"))


def test_damage_is_told_in_a_line(tmp_path):
    file = tmp_path / "s" / "train" / "a.tfrecord"
    write(file, [("yes", x) for x in features(2)])
    whole = file.read_bytes()
    for damaged, said in (
        (whole[:-30], "cut short"),
        (b"\x00" + whole, "damaged"),
        (whole + whole[:5], "damaged"),
        (whole[:12] + bytes(range(200)) + whole[212:], "damaged|without|no 4"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=said):
            list(NeuralSessions(tmp_path))
    write(file, [("yes", features(1)[0])], drop=["transcription"])
    with pytest.raises(UserError, match="transcription"):
        list(NeuralSessions(tmp_path))
    write(file, [("yes", features(1)[0])], bins=39)
    with pytest.raises(UserError, match="39 time bins"):
        NeuralSessions(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="no sentence"):
        NeuralSessions(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="tfrecord"):
        NeuralSessions(tmp_path)
