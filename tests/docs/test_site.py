"""The documentation site: its pages, its tables, and what is done to them when it is built."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from weakseg.methods import methods
from weakseg.mixing import mixes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nav(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _nav(part)


def test_nav_holds_every_page_once():
    shown = list(_nav(CONFIG["nav"]))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(shown) == sorted(pages)


def test_nothing_is_fetched_from_other_hosts():
    assert CONFIG["theme"]["font"] is False
    assert not CONFIG.get("extra_javascript")
    assert not [path for path in CONFIG["extra_css"] if "//" in path]


@pytest.mark.parametrize("name", list(methods))
def test_each_method_has_a_page_that_names_its_settings(name):
    page = DOCS / "methods" / f"{name}.md"
    assert f"methods/{name}.md" in _nav(CONFIG["nav"])
    text = page.read_text(encoding="utf-8")
    missing = [key for key in methods[name].Config.model_fields if f"| `{key}` |" not in text]
    assert not missing
    assert all(f"`{recipe}`" in text for recipe in methods[name].card.recipes)
    assert "$$" in text, "no formula"
    assert f"](../images/methods/{name}.png)" in text, "no picture"


def test_the_page_of_mixes_names_their_settings():
    text = (DOCS / "methods" / "mixes.md").read_text(encoding="utf-8")
    for name in mixes:
        block = text.split(f"<!-- begin settings {name} -->")[1].split("<!-- end")[0]
        assert [key for key in mixes[name].Config.model_fields if f"| `{key}` |" not in block] == []


def test_tables_are_those_of_the_results_and_the_code():
    """Otherwise: uv run python benchmarks/tables.py."""
    pages = _module(ROOT / "benchmarks" / "tables.py").pages()
    assert len(pages) > 8
    stale = [p.name for p, text in pages.items() if p.read_text(encoding="utf-8") != text]
    assert not stale


def test_every_table_that_is_made_is_shown():
    text = "".join(p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *DOCS.rglob("*.md")])
    made = _module(ROOT / "benchmarks" / "tables.py").tables()
    assert [name for name in made if f"<!-- begin {name} -->" not in text] == []


@pytest.fixture
def pages_hook():
    pytest.importorskip("latex2mathml", reason="in the group docs: uv run --group docs pytest")
    return _module(DOCS / "hooks" / "pages.py")


def test_formulas_become_mathml(pages_hook):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    block = (
        r'<div class="arithmatex">\[\begin{aligned}a &amp;= b \\ c &amp;&lt; d\end{aligned}\]</div>'
    )
    found = pages_hook.on_page_content(f'{block}<span class="arithmatex">\\(x\\)</span>', page)
    assert found.count("<math") == 2
    assert found.count("<mtr>") == 2, "rows of the aligned formula"
    assert pages_hook.on_page_content("<td>1.5 ± 0.2</td>", page) == "<td>1.5&nbsp;±&nbsp;0.2</td>"
    assert "arithmatex" not in found and "\\" not in found and "&</" not in found


def test_a_formula_that_cannot_be_said_stops_a_strict_build(pages_hook, caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    with caplog.at_level(logging.WARNING):
        pages_hook.on_page_content(r'<span class="arithmatex">\(\nosuchcommand x\)</span>', page)
    assert "a.md" in caplog.text and "nosuchcommand" in caplog.text
    assert caplog.records[0].name.startswith("mkdocs"), "mkdocs counts its own warnings"


def test_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="in the group docs: uv run --group docs pytest")
    as_markdown = _module(DOCS / "hooks" / "docstrings.py").as_markdown
    text = "Maps :math:`A \\in\n    R`, see :func:`~a.b`:\n\n.. math::\n    L &= 1 \\\\\n    M &= 2\n\nThe end."
    assert as_markdown(text) == (
        "Maps $A \\in R$, see `a.b`:\n\n"
        "$$\n\\begin{aligned}\nL &= 1 \\\\\nM &= 2\n\\end{aligned}\n$$\n\nThe end."
    )
