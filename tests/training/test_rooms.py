"""Where things are: who may import whom, who reads a configuration, and how long a module is."""

import ast
import graphlib
from pathlib import Path

import pytest

import fedasr

ROOT = Path(fedasr.__file__).parent
# What stands on training; all the rest of the package lies below it.
ABOVE = (
    *("training", "fusion", "feedback", "attacks", "compiling"),
    *("recipes", "cli", "__main__"),
)
MOST_LINES = 500


def modules():
    """{dotted name: (path, syntax tree)} of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path, ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imported(tree):
    """Modules that are imported, wherever; not those that only annotations need."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in whole)


def reads_configuration(tree):
    """Lines with config["..."], whatever holds it, or that name the typed configuration."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            held, key = ast.unparse(node.value).split(".")[-1], node.slice.value
            if isinstance(key, str) and (held in ("config", "settings") or key == "config"):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "fedasr.training.config":
            yield node.lineno


def below_training():
    return [name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] not in ABOVE]


def test_the_reader_of_this_test_sees_what_it_looks_for():
    text = 'x = run.config["privacy"]\ny = m["config"]\nz = settings["sigma"]\nw = config[x]\n'
    assert list(reads_configuration(ast.parse(text))) == [1, 2, 3]
    text = "if TYPE_CHECKING:\n    import a.b\ndef f():\n    from c import d\n"
    assert list(imported(ast.parse(text))) == ["c"]
    assert len(below_training()) > 50


@pytest.mark.parametrize("name", below_training())
def test_what_lies_below_training_takes_plain_objects(name):
    """Neither training nor a configuration is known there."""
    _, tree = MODULES[name]
    assert not [x for x in imported(tree) if x.startswith("fedasr.training")]
    if not name.startswith("fedasr.models.pretrained"):  # which read others' config.json
        assert not list(reads_configuration(tree))


def test_no_circle_within_training():
    names = {name for name in MODULES if name.startswith("fedasr.training.")}
    graph = {name: set(imported(MODULES[name][1])) & names - {name} for name in names}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("fedasr.training.config") < order.index("fedasr.training.builders.models")
    # What builds a run knows nothing of how it goes on.
    for name in names:
        if name.startswith("fedasr.training.builders"):
            later = {"loop", "stages", "session", "dry_run", "trainers"}
            assert not {x.split(".")[2] for x in graph[name]} & later, name


def test_modules_of_training_are_short():
    long = {
        name: lines
        for name, (path, _) in MODULES.items()
        if name.startswith("fedasr.training")
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long
