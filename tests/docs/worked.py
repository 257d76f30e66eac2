"""The method that docs/adding-a-method.md builds, installed for as long as a test lasts."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.pages import blocks, find_page
from weakseg.methods import methods

__all__ = ["GROUP", "installed", "written"]

GROUP = "weakseg.methods"


def written(folder: Path) -> dict[str, Path]:
    """The files that the page shows, by name, written into the folder."""
    files = {b.title: b.text for b in blocks(find_page("adding-a-method.md")) if b.title}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in files}


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Installs the page's package as pip does, by its own pyproject.toml; afterwards it is gone."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"][GROUP]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    listed = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{listed}")
    before = list(methods)  # all of the package's own are there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "_members", dict(methods._members))
        patch.setattr(methods, "_group", GROUP)
        patch.syspath_prepend(folder)
        try:
            yield
        finally:
            for value in points.values():
                sys.modules.pop(value, None)
    assert list(methods) == before
