"""The research script in the README runs, on a tiny corpus and with a tiny model."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = {
    "dim=128, blocks=4": "dim=16, blocks=1, heads=2, mlp=16",
    "expected_cohort=8": "expected_cohort=3",
    "run(state, rounds=120)": "run(state, rounds=2)",
    "batch_size=4, steps=4": "batch_size=2, steps=1",
}


def script():
    """The block ```py of the README, or of a page of the documentation."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [
        block
        for page in pages
        for block in re.findall(r"^```py\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
        if "fa.open_corpus" in block
    ]
    assert found
    return found


def test_the_script_runs(corpus_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(corpus_dir)
    monkeypatch.chdir(tmp_path)
    for text in script():
        assert sum(bool(line.strip()) for line in text.splitlines()) <= 15
        for old, new in TINY.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        namespace = {"__name__": "script"}
        exec(compile(text, "the script", "exec"), namespace)
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said[:2]] == ["1", "2"] and len(said) == 3
        assert float(said[2].split()[0]) > 1
        for word in ("'wer'", "'cer'", "'loss'"):
            assert word in said[2]
        # The names of the package are all that it takes from it.
        assert set(re.findall(r"\bfa\.(\w+)", text)) <= set(namespace["fa"].__all__)
