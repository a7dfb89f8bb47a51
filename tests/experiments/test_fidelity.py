"""The page of what was published: made from the table, and the table held against the code."""

import ast
import functools
import importlib
from pathlib import Path

import pytest

from fedasr.recipes import fidelity
from fedasr.text import normalize_text
from fedasr.training.logging import to_json

ROOT = Path(__file__).parents[2]
ITEMS = [item for items in fidelity.SECTIONS.values() for item in items]


@functools.cache
def configuration(recipe):
    name, _, arguments = recipe.partition(":")
    module = importlib.import_module(f"fedasr.recipes.{name}")
    return to_json(module.get_config(arguments).to_dict())


@functools.cache
def names_in(path):
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name.replace(" ", "-"))
def test_an_item_is_true_of_the_code(item):
    assert item.how in (fidelity.SAME, fidelity.OPTION, fidelity.DIFFERS)
    assert bool(item.because) == (item.how == fidelity.DIFFERS)
    assert bool(item.recipe) == bool(item.fields)
    for name, value in item.fields.items():
        found = functools.reduce(
            lambda tree, key: tree[key], name.split("."), configuration(item.recipe)
        )
        assert found == value, name
    if item.test:
        path, _, name = item.test.partition("::")
        assert name in names_in(path)
    # What is said to be as published is shown to be.
    assert item.how == fidelity.DIFFERS or item.fields or item.test


def test_options_are_no_defaults():
    """What an option sets, other configurations have otherwise: a default would be "same"."""
    from fedasr.training.config import default_config

    default = to_json(default_config().to_dict())
    for item in ITEMS:
        if item.how == fidelity.OPTION:
            differing = [
                name
                for name, value in item.fields.items()
                if functools.reduce(lambda tree, key: tree.get(key), name.split("."), default)
                != value
            ]
            assert differing, item.name


def test_the_page_is_the_table():
    written = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert written == fidelity.page(), "python -m fedasr.recipes.fidelity > docs/fidelity.md"
    for item in ITEMS:
        assert not {"|", "\n"} & set(item.name + item.published + item.ours + item.because)


def test_no_known_difference_is_silent():
    """What a comparison with the public programs found, by words of the lines that name it."""
    page = fidelity.page()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    known = [
        ("floor(L/3)",),
        ("residual branches", "positions"),
        ("1 / fan-in",),
        ("residual stream",),
        ("one draw",),
        ("order of their lengths",),
        ("F - 1",),
        ("LARS", "1e-8"),
        ("AdaGrad", "accumulator"),
        ("256 users", "10 local steps"),
        ("words + 2", "30 s"),
        ("U+2014",),
        ("scripts", "digits"),
        ("hyphens",),
        ("21", "17"),
        ("align",),
        ("second weight",),
        ("competitionHoldOut",),
        ("orthogonal",),
        ("epsilon, .1",),
        ("100,000 batches",),
        ("random-walk",),
        ("L2",),
        ("initial state",),
        ("9 taps",),
        ("recalibration",),
        ("GPT-2",),
        ("handwriting",),
        ("g2p_en",),
        ("central baseline",),
        ("tfrecords",),
        ("key 42",),
        ("MAP-Elites",),
        ("by depth",),
        ("checkpoints of others",),
    ]
    for words in known:
        assert any(all(word in line for word in words) for line in lines), words


def test_hyphens_at_the_edges_of_words_go():
    assert normalize_text("so -called, well- known") == ("so called well known", 0)
    assert normalize_text("well-known") == ("well-known", 0)
