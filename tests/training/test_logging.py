"""Metrics survive kills and resumes, and are always valid JSON."""

import io
import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.training import logging as run_logging
from fedasr.training.logging import (
    RunLogger,
    from_json,
    read_metrics,
    to_json,
    write_json_atomic,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quiet(workdir, *args, **kwargs) -> RunLogger:
    return RunLogger(workdir, *args, tensorboard=False, stream=io.StringIO(), **kwargs)


def strict(text: str):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_writes_one_object_per_round(tmp_path):
    with quiet(tmp_path / "run") as log:
        log.start(3)
        log.step(10, {"loss": jnp.float32(0.1)})
        log.round(1, {"loss": np.float32(2.5), "update_norm": {"a/b": jnp.bfloat16(0.5)}})
        log.round(2)
        log.round(3, {"cohort": np.int64(7), "ok": np.bool_(True), "list": np.arange(2)})
        # On disk before the logger is closed.
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [
        {"phase": "seed", "step": 10, "loss": 0.1},
        {"phase": "federated", "round": 1, "loss": 2.5, "update_norm": {"a/b": 0.5}},
        {"phase": "federated", "round": 3, "cohort": 7, "ok": True, "list": [0, 1]},
    ]
    assert read_metrics(tmp_path / "run") == [strict(line) for line in lines]


@settings(deadline=None, max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_value_is_strict_json_with_null_for_non_finite(value):
    def words(v):
        if isinstance(v, list):
            found = [words(x) for x in v]
            return found if any(found) else False
        if isinstance(v, float) and math.isinf(v):
            return True if v > 0 else "negative"
        return False

    def expected(v):
        if isinstance(v, float) and not math.isfinite(v):
            return None
        if isinstance(v, dict):
            said = {}
            for k, x in v.items():
                said[k] = expected(x)
                if words(x):
                    said[f"{k}_infinite"] = words(x)
            return said
        return [expected(x) for x in v] if isinstance(v, list) else v

    assert strict(json.dumps(to_json(value), allow_nan=False)) == expected(value)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["a", "epsilon", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: (
                st.lists(inner) | st.dictionaries(st.sampled_from(["b", "c"]), inner, max_size=2)
            ),
            max_leaves=8,
        ),
    )
)
def test_infinities_are_read_back(value):
    written = json.loads(json.dumps(to_json(value), allow_nan=False))
    assert from_json(written) == value
    assert to_json(from_json(written)) == written
    assert to_json(written) == written


def test_infinity_and_nan_by_hand(tmp_path):
    figures = {"epsilon": np.float32("inf"), "loss": math.nan, "least": [1.0, -math.inf]}
    assert to_json(figures) == {
        "epsilon": None,
        "epsilon_infinite": True,
        "loss": None,
        "least": [1.0, None],
        "least_infinite": [False, "negative"],
    }
    # A word of somebody else's about a number that is there is left alone.
    for own in ({"x_infinite": True}, {"x": 1.0, "x_infinite": True}):
        assert from_json(own) == own
    with quiet(tmp_path) as log:
        log.round(1, {"epsilon": math.inf})
    assert '"epsilon": null, "epsilon_infinite": true' in (tmp_path / "metrics.jsonl").read_text()
    with quiet(tmp_path, 1):  # resumed: written again as it was
        pass
    (record,) = read_metrics(tmp_path)
    assert record["epsilon"] == math.inf and "epsilon_infinite" not in record


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_non_finite_arrays_and_odd_types(dtype):
    values = np.array([1.5, np.nan, np.inf, -np.inf]).astype(dtype)
    assert to_json(values) == [1.5, None, None, None]
    assert [to_json(v) for v in values] == [1.5, None, None, None]
    assert to_json({1: (Path("a"), {"b"})}) == {"1": ["a", ["b"]]}


@pytest.mark.parametrize("torn", ["", '{"phase": "federated", "round": 3, "lo', '{"round": 4}'])
def test_resume_keeps_every_round_once(tmp_path, torn):
    with quiet(tmp_path) as log:
        for step in (1, 2):
            log.step(step, {"loss": 1.0})
        for round in range(6):
            log.round(round, {"loss": float(round), "try": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)  # No newline: cut off by a kill.
    with quiet(tmp_path, 3) as log:
        for round in range(3, 8):
            log.round(round, {"loss": float(round), "try": 2})
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if r["phase"] == "seed"] == [1, 2]
    federated = [r for r in records if r["phase"] == "federated"]
    assert [(r["round"], r["try"]) for r in federated] == [
        *((round, 1) for round in range(4)),
        *((round, 2) for round in range(4, 8)),
    ]


def test_resume_within_the_seed_and_afresh(tmp_path):
    with quiet(tmp_path) as log:
        for step in (5, 10, 15):
            log.step(step, {"loss": 1.0})
        log.round(1, {})
    quiet(tmp_path, 0, 10).close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [5, 10]
    quiet(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_read_metrics_leaves_out_what_is_not_a_record(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n[1]\nnoise\n{"round": 2}\n{"round": 3')
    assert [r["round"] for r in read_metrics(tmp_path)] == [1, 2]


def test_write_json_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"wer": np.float32(12.5), "epsilon": math.inf})
    assert strict(path.read_text()) == {"wer": 12.5, "epsilon": None, "epsilon_infinite": True}

    def crash(*_):
        raise OSError("killed")

    monkeypatch.setattr(run_logging.os, "fsync", crash)
    with pytest.raises(OSError, match="killed"):
        write_json_atomic(path, {"wer": 0})
    assert strict(path.read_text()) == {"wer": 12.5, "epsilon": None, "epsilon_infinite": True}


def test_plain_progress_tells_rate_and_remaining_time(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1e3, 0.5))
    monkeypatch.setattr(run_logging.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with RunLogger(tmp_path, tensorboard=False, stream=out, interval=3.0) as log:
        log.message("hello")
        log.start(100, done=90)
        for round in range(91, 101):
            log.round(round, {"loss": 2.0, "eval": {"dev": {"wer": 12.34}}})
        log.start(4, phase="seed")
        log.step(1, {})
    lines = out.getvalue().splitlines()
    assert lines[0] == "hello"
    assert lines[1] == "federated 96/100  2.00 rounds/s  0:02 left  loss 2.000  dev WER 12.3%"
    assert lines[2].startswith("federated 100/100  2.00 rounds/s  0:00 left")
    assert len(lines) == 3


def test_bar_on_a_terminal(tmp_path):
    pytest.importorskip("rich")
    out = Terminal()
    with RunLogger(tmp_path, tensorboard=False, stream=out) as log:
        log.start(2)
        log.round(1, {"loss": 1.25})
        log.message("[bold]kept as it is")
        log.round(2, {"loss": 1.0})
    assert "2/2" in out.getvalue() and "[bold]kept as it is" in out.getvalue()


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with RunLogger(tmp_path, stream=io.StringIO()) as log:
        log.round(7, {"loss": 0.5, "eval": {"dev": {"wer": 30.0}}, "epsilon": math.inf, "s": "x"})
    (path,) = (tmp_path / "tensorboard" / "federated").iterdir()
    data, seen = path.read_bytes(), {}
    while data:  # TFRecord: length, its CRC, the event, its CRC.
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            seen[value.tag] = (event.step, value.simple_value)
        data = data[16 + size :]
    assert seen == {"loss": (7, 0.5), "eval/dev/wer": (7, 30.0)}


def test_works_without_optional_packages(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    out = Terminal()
    with caplog.at_level("WARNING"), RunLogger(tmp_path, stream=out, interval=0.0) as log:
        log.start(1)
        log.round(1, {"loss": 1.0})
    assert "install tensorboardX" in caplog.text
    assert "federated 1/1" in out.getvalue()
    assert len(read_metrics(tmp_path)) == 1
