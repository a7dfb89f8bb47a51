"""A small part of `experiments.fuzz_data`, and that it finds what it is there to find."""

import pytest

from experiments import fuzz_data
from fedasr.data import recordings
from fedasr.data.containers import Contents

pytest.importorskip("soundfile", reason="soundfile is needed to write recordings")


def test_malformed_inputs_are_refused_or_read_right():
    found = fuzz_data.fuzz(range(250), seed=7)
    assert found["mishandled"] == {}
    assert sum(found["outcomes"].values()) == 250
    assert len(found["outcomes"]) >= 12  # every kind of input, refused and not


def test_a_decoder_that_is_believed_is_found_out(monkeypatch):
    fuzz_data.decoded.cache_clear()
    monkeypatch.setattr(recordings.containers, "examine", lambda content: Contents((content,)))
    found = fuzz_data.fuzz(range(120), seed=7)
    fuzz_data.decoded.cache_clear()
    assert len(found["mishandled"]) >= 5
    assert any("instead of" in why for why in found["mishandled"].values())
