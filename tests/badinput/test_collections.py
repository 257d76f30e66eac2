"""Images, tables, names, links and masks: each ends as the corpus promises."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.badinput.conftest import Weakseg, listing
from tests.badinput.corpus import IMAGES, LINKS, MASKS, NAMES, TABLES, Case, World, problem_of
from weakseg.data.images import write_mask

ALL = [*IMAGES, *TABLES, *NAMES, *LINKS, *MASKS]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_check(case: Case, world: World, weakseg: Weakseg) -> None:
    made = case.spoil(world)
    table: Path | None = world.table
    words: list[object] = []
    severe: set[str] = set()
    if isinstance(made, tuple) and made[0] == "table":
        table = made[1]
    elif isinstance(made, tuple) and made[0] == "errors":
        severe = made[1]
    elif isinstance(made, tuple):
        words = list(made)
    before = listing(world.root)
    source = [world.images] if table is None else [world.images, table]
    result = weakseg("check", *source, "--json", *words)
    assert listing(world.root) == before
    if case.error:
        result.refused(case.error)
        return
    found = json.loads(result.out)
    assert result.code == (2 if any(p["severity"] == "error" for p in found["problems"]) else 0)
    if case.code:
        problem_of(found, case.code, case.item)
    elif severe:
        assert severe & {p["code"] for p in found["problems"] if p["severity"] == "error"}
    else:
        assert result.code == 0, found["problems"]
        if callable(made):
            assert made(found) in (None, True)


def test_the_corpus_is_as_large_as_it_says() -> None:
    names = [case.name for case in ALL]
    assert len(names) == len(set(names)) >= 60


def forbid(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """What permissions are to a user; to root, as whom tests may run, nothing is forbidden."""
    path.chmod(0)
    reads, scans = Path.read_bytes, os.scandir

    def read(self: Path) -> bytes:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return reads(self)

    def scan(folder: str) -> object:
        if Path(folder) == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scans(folder)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(os, "scandir", scan)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_file_that_may_not_be_read(
    kind: str, world: World, weakseg: Weakseg, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = world.root / "masks"
    for i in range(12):
        write_mask(masks / f"{i}.png", np.ones((40, 40), np.uint8))
    forbid(monkeypatch, (world.images if kind == "image" else masks) / "3.png")
    found = json.loads(weakseg("check", world.images, world.table, "--masks", masks, "--json").out)
    code = "forbidden-file" if kind == "image" else "mask-forbidden"
    problem_of(found, code, "3")
    (problem,) = (p for p in found["problems"] if p["code"] == code)
    assert problem["severity"] == "error" and "permissions" in problem["mend"]


def test_a_twin_of_class_folders_that_may_not_be_read(
    world: World, weakseg: Weakseg, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tag in ("cat", "dog"):
        for i in range(3):
            world.add(f"classes/{tag}/{i}.png", seed=i)
    forbid(monkeypatch, world.images / "classes" / "dog" / "1.png")
    found = json.loads(weakseg("check", world.images / "classes", "--json").out)
    assert "forbidden-file" in {p["code"] for p in found["problems"]}


def test_a_folder_that_may_not_be_read(
    world: World, weakseg: Weakseg, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("inner/a.png", seed=60)
    forbid(monkeypatch, world.images / "inner")
    before = listing(world.root)
    result = weakseg("check", world.images, world.table)
    result.refused("may not be read")
    assert str(world.images / "inner") in result.err and "--out" not in result.err
    assert listing(world.root) == before


@pytest.mark.parametrize("root", ["/", "//", "/.", "/tmp/..", "/proc", "/proc/self"])
def test_the_systems_own_folders(root: str, world: World, weakseg: Weakseg) -> None:
    """Nobody means them, and looking through them takes hours."""
    weakseg("check", root, world.table).refused("system's own folder")
    weakseg("check", root).refused("system's own folder")
    recipe = world.root / "recipe.yaml"
    recipe.write_text(f"data: {{root: {root}, labels: {world.table}}}")
    weakseg("check", recipe).refused("system's own folder")


@pytest.mark.parametrize(
    "name", ["class_names_of_html", "emoji_and_right_to_left", "class_names_of_paths_and_yaml"]
)
def test_the_page_escapes_names(name: str, world: World, weakseg: Weakseg, tmp_path: Path) -> None:
    next(case for case in NAMES if case.name == name).spoil(world)
    before = listing(tmp_path, tmp_path / "out")
    page = tmp_path / "out" / "check.html"
    assert weakseg("check", world.images, world.table, "--report", page).code == 0
    assert listing(tmp_path, tmp_path / "out") | {"out": ()} == before | {"out": ()}
    assert "<script" not in page.read_text() and "<img" not in page.read_text()
