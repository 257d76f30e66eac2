"""Images, tables, names, links and masks: each ends as the corpus promises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.badinput.conftest import Weakseg, listing
from tests.badinput.corpus import IMAGES, LINKS, MASKS, NAMES, TABLES, Case, World, problem_of

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


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_image_that_may_not_be_read(world: World, weakseg: Weakseg) -> None:
    (world.images / "3.png").chmod(0)
    problem_of(
        json.loads(weakseg("check", world.images, world.table, "--json").out),
        "unreadable-file",
        "3",
    )


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
