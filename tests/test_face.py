"""`import fedasr`: the names it offers, what it imports for them, and the errors of the package."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fedasr as fa

FOLDER = Path(fa.__file__).parent
# Imports fedasr, looks at all it offers and takes what needs no JAX.
LAZY = """
import sys
import fedasr
dir(fedasr), fedasr.__version__, fedasr.UserError
large = {"jax", "flax", "optax", "numpy", "scipy", "matplotlib", "tensorflow_datasets", "absl"}
print(*sorted(large & sys.modules.keys()))
fedasr.PoissonSampler(10, 2.0, seed=0), fedasr.Sampler, fedasr.word_errors
print(*sorted({"jax", "flax", "optax"} & sys.modules.keys()))
fedasr.Mechanism
print("jax" in sys.modules)
"""


def test_nothing_large_is_imported_before_it_is_used():
    done = subprocess.run(
        [sys.executable, "-c", LAZY], capture_output=True, text=True, check=True, cwd=FOLDER.parent
    )
    assert done.stdout.splitlines() == ["", "", "True"]


@pytest.mark.parametrize("name", fa.__all__)
def test_every_name_is_there_and_explained(name):
    value = getattr(fa, name)
    assert value is getattr(fa, name) and name in dir(fa)
    assert inspect.getdoc(value), name
    assert value.__name__ == name  # nothing is renamed on its way out


def test_type_checkers_are_told_the_same():
    """What `if TYPE_CHECKING:` imports is what is looked up, by names that count as exported."""
    tree = ast.parse(Path(fa.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            assert alias.asname == alias.name
            told[alias.name] = statement.module
    assert told == fa._HOME and sorted(told) == fa.__all__
    assert (FOLDER / "py.typed").exists()


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Simulator'"):
        _ = fa.Simulator
    with pytest.raises(ImportError):
        exec("from fedasr import Simulator", {})
    assert importlib.import_module("fedasr.streams") is fa.streams  # modules stay what they are
    namespace = {}
    exec("from fedasr import *", namespace)
    assert namespace.keys() >= set(fa.__all__)


def test_mistakes_are_value_errors():
    with pytest.raises(ValueError, match="unknown model 'lstm'"):
        fa.recogniser("lstm")
    assert issubclass(fa.UserError, ValueError)


def handlers():
    """(file, line, names) of every handler in the package, with those before it in its `try`."""
    for path in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Try):
                before: set[str] = set()
                for handler in node.handlers:
                    kinds = handler.type
                    kinds = kinds.elts if isinstance(kinds, ast.Tuple) else [kinds]
                    names = {ast.unparse(kind) for kind in kinds if kind is not None}
                    yield path, node, names, before
                    before = before | names


def test_a_mistake_is_not_taken_for_other_code_s_value_error():
    """Whatever handles ValueError lets UserError pass first where its block may raise one."""
    for path, node, names, before in handlers():
        body = "\n".join(map(ast.unparse, node.body))
        if "ValueError" in names and "UserError" not in before:
            assert "UserError" not in body, f"{path}:{node.lineno}"


def test_an_unknown_event_in_a_ledger_is_named():
    """`from_data` turns damage into a UserError of its own, but not one that says more."""
    from fedasr.privacy import ledger

    entry = ledger.without_privacy("a run", "seed", 1, ledger.Users.of(["anna"]))
    data = ledger.to_data([entry])
    data[0]["event"]["type"] = "DriedFish"
    with pytest.raises(fa.UserError, match=r"^the ledger has an event that is not known"):
        ledger.from_data(data)
    del data[0]["event"]
    with pytest.raises(fa.UserError, match="ledger cannot be read: KeyError"):
        ledger.from_data(data)
