"""Pages that are made when the site is built: the reference, and the files of the root.

The API's pages hold one line each, which mkdocstrings replaces by what the docstrings of a module
say, read from its source (nothing is imported). The page of the configuration is made from the
declared fields. `CONTRIBUTING.md` and `CHANGELOG.md` lie where people look for them, and are pages
as well.
"""

import importlib.util
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def modules() -> list[str]:
    """Dotted names of all modules and packages of fedasr whose name has no underscore in front."""
    names = []
    for path in sorted((ROOT / "fedasr").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


def api_pages() -> dict[str, str]:
    """Text by address: a page for each module, and one that lists them."""
    names = modules()
    listed = "".join(
        f"{'    ' * (name.count('.') - 1)}* [`{name}`](api/{name}.md)\n"
        for name in names
        if "." in name
    )
    pages = {
        "reference/api.md": "# API\n\nEach module on a page of its own, made from its docstrings. "
        f"The package itself is [`fedasr`](api/fedasr.md).\n\n{listed}"
    }
    for name in names:
        pages[f"reference/api/{name}.md"] = f"# `{name}`\n\n::: {name}\n"
    return pages


def root_pages() -> dict[str, str]:
    """Files of the root as pages: links to what lies under docs/ lose that folder."""
    return {
        address: re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        for address, name in ROOT_PAGES.items()
    }


def configuration_page() -> dict[str, str]:
    """The reference of the configuration."""
    path = Path(__file__).with_name("configuration.py")
    spec = importlib.util.spec_from_file_location("fedasr_docs_configuration", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"reference/configuration.md": module.page()}


def on_files(files, config):
    """Adds the pages (an event of mkdocs)."""
    for address, text in (api_pages() | root_pages() | configuration_page()).items():
        files.append(File.generated(config, address, content=text))
    return files
