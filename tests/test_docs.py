"""The documentation: its site, its references, its links and the shape of its prose."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fedasr.fields import Field, flatten
from fedasr.training import config

ROOT = Path(__file__).parents[1]
FRONT = [ROOT / name for name in ("README.md", "BUILD_NOTES.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*FRONT, *sorted((ROOT / "docs").rglob("*.md"))]
DATED = {"decisions", "results"}  # folders whose pages say how things were
LONGEST = 110
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(text):
    """Lines of a page without its blocks of code."""
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield line


def anchors(text):
    """What a heading can be linked by."""
    titles = [line.lstrip("#").strip() for line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_wraps(page):
    for line in prose(page.read_text(encoding="utf-8")):
        table = line.startswith("|")
        assert table or len(LINK.sub("", line)) <= LONGEST, f"{page.name}: {line}"


@pytest.mark.parametrize(("page", "most"), [("README.md", 150), ("BUILD_NOTES.md", 100)])
def test_front_pages_are_short(page, most):
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) < most


def test_links_lead_somewhere():
    """Links of the files of the root, too, which the site's own check does not see."""
    made = {"reference/api.md", "reference/configuration.md", *load("hooks").ROOT_PAGES}
    made = {ROOT / "docs" / address for address in made}
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in LINK.findall("\n".join(prose(text))):
            if link.startswith(("https://", "http://")):
                continue
            address, _, anchor = link.partition("#")
            target = page.parent / address if address else page
            target = Path(os.path.normpath(target))
            assert target.exists() or target in made, f"{page.name}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"
            seen += 1
    assert seen > 100


def test_no_page_is_an_island():
    """Every page is reached from the site's menu, the index of its folder, or the front."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[len(FRONT) :]:
        folder, address = page.parent, page.relative_to(ROOT / "docs").as_posix()
        index = folder / "index.md"
        listed = f"({page.name})" in index.read_text(encoding="utf-8") if index.exists() else False
        assert listed or f": {address}\n" in menu, page


def test_paths_that_are_named_exist():
    """Of pages that say how things are now; decisions and results have their date."""
    seen = 0
    for page in PAGES:
        if page.parent.name in DATED or page.name == "CHANGELOG.md":
            continue
        code = re.findall(r"`([^`\s]+)`", "\n".join(prose(page.read_text(encoding="utf-8"))))
        for path in code:
            if re.fullmatch(r"(fedasr|experiments|tests|docs|\.ci)/[\w./-]+", path):
                assert (ROOT / path).exists(), f"{page.name}: {path}"
                seen += 1
            elif re.fullmatch(r"(fedasr|experiments)(\.\w+)+", path):
                parts = path.split(".")
                module = next(
                    file
                    for count in range(len(parts), 0, -1)
                    for file in (
                        ROOT.joinpath(*parts[:count]).with_suffix(".py"),
                        ROOT.joinpath(*parts[:count]) / "__init__.py",
                    )
                    if file.exists()
                )
                known = set(module.relative_to(ROOT).with_suffix("").parts)
                source = module.read_text(encoding="utf-8")
                for part in set(parts) - known:
                    assert re.search(rf"\b{part}\b", source), f"{page.name}: {path}"
                seen += 1
    assert seen > 30


def test_every_result_has_its_command_and_date():
    for page in sorted((ROOT / "docs" / "results").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.name != "index.md":
            assert re.search(r"^Measured \d{4}-\d\d-\d\d", text, re.MULTILINE), page.name
            assert re.search(r"^```bash\npython -m ", text, re.MULTILINE), page.name


def test_every_field_is_in_the_reference():
    """With its words, default, unit and range."""
    made = load("configuration")
    page = made.page()
    declared = flatten(config.fields())
    assert len(declared) > 90
    found, section = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = f"{line[3:].strip('`')}." if "`" in line else ""
        elif match := re.match(r"\| `(\w+)` \| (.*) \|$", line):
            found[section + match[1]] = re.split(r"(?<!\\) \| ", match[2])
    assert found.keys() == declared.keys()
    for path, (words, default, unit, allowed) in found.items():
        field = declared[path]
        assert re.match(r"[A-Z\"]", words) and words.endswith("."), f"{path} is not explained"
        assert unit == field.unit
        shown = f"`{field.default!r}`"
        assert default == shown or path.endswith("options"), path
        assert allowed and "None" not in allowed, path
        if allowed.startswith("one of `"):
            for name in allowed.removeprefix("one of ").split(", "):
                assert field.check(name.strip("`")) is None, path
    for name in made.WORDS:
        assert any(path == name or path.endswith(f".{name}") for path in declared), name


def test_ranges_are_those_of_the_checks():
    from fedasr.fields import choice, real, whole

    allowed = load("configuration").allowed
    assert allowed(whole(3, 1, 7)) == "whole number, at least 1 and at most 7"
    assert allowed(real(0.5, above=0, below=1)) == "number, above 0 and below 1"
    assert allowed(choice("a", ("b", "a"))) == "one of `a`, `b`"


def test_declarations_become_words():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        """What is inside.

        Attributes:
          other: not shown.
        """

    @dataclasses.dataclass(frozen=True)
    class Config:
        inner: Inner = dataclasses.field(default_factory=Inner, metadata={"section": Inner})

    module = types.SimpleNamespace(
        Config=Config,
        fields=lambda: {"inner": {"one": Field(1, bool, doc="the first"), "two": Field(2, bool)}},
    )
    words = load("configuration").declared_words(module)
    assert words == {"inner": "What is inside.", "inner.one": "The first."}


@pytest.mark.slow
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is needed to build the site")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for page in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        foreign = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", text)
        foreign += re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", text)
        assert not foreign, f"{page.name}: {foreign}"
    modules = load("hooks").modules()
    assert len(modules) > 50
    for module in modules:
        assert (tmp_path / "reference" / "api" / f"{module}.html").exists()
    mechanism = tmp_path / "reference" / "api" / "fedasr.privacy.mechanism.html"
    assert "The one object that states the privacy of a run." in mechanism.read_text()


def test_habits_run_what_is_there():
    """Hooks and workflow name tools of an extra, and the script that is there."""
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    tools = {hook["entry"].split()[0] for repo in hooks for hook in repo["hooks"]}
    assert tools == {"ruff", "mypy", "lint-imports"}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for package in ("ruff", "mypy", "import-linter", "pre-commit"):
        assert f'"{package}>=' in setup
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands and os.access(ROOT / ".ci" / "run", os.X_OK)
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"):
        head = yaml.safe_load(template.read_text(encoding="utf-8").split("---")[1])
        assert head["name"] and head["about"]
