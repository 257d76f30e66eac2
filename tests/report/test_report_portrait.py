"""The picture of a collection: complete, harmless, and drawn from the check's numbers alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_bench import Workbench, make_collection
from test_report_page import Page, written

from weakseg.data.check import check
from weakseg.report.portrait import portrait, write_check_page


def values(classes: int = 3) -> dict:
    """A check.json with known numbers."""
    matrix = np.diag(np.arange(4, 4 + classes))
    matrix[0, 1] = matrix[1, 0] = 2
    return {
        "classes": [f"class {i}" for i in range(classes)],
        "sizes": {"a": [100, 200], "b": [100, 200], "c": [300, 200]},
        "tags_per_image": {"train": [1, 3], "val": [0, 1, 1]},
        "cooccurrence": matrix.tolist(),
        "problems": [],
    }


def drawn(check: dict) -> dict[str, str]:
    return {chart.title: str(chart.svg) for chart in portrait(check)}


def titles(svg: str) -> list[str]:
    return re.findall(r"<title>([^<]*)</title>", svg)


def test_the_numbers_are_those_of_the_check() -> None:
    charts = drawn(values())
    assert titles(charts["Tags of an image"]) == [
        "tags 0\ntrain: 25 %\nval: 0 %",
        "tags 1\ntrain: 75 %\nval: 50 %",
        "tags 2\ntrain: 0 %\nval: 50 %",
    ]
    assert sorted(t[-8:] for t in titles(charts["Sizes of the images"])) == ["1 images", "2 images"]
    assert titles(charts["Classes that come together"]) == [
        "class 0 with class 1: 2 of 4 images (50 %)",
        "class 1 with class 0: 2 of 5 images (40 %)",
    ]


def test_the_darkness_of_a_cell_is_the_root_of_the_share() -> None:
    shades = re.findall(r'fill-opacity="([^"]+)"', drawn(values())["Classes that come together"])
    assert [float(s) for s in shades] == pytest.approx([0.5**0.5, 0.4**0.5], abs=0.01)


def test_many_classes_are_cut_to_those_with_most_images() -> None:
    chart = portrait(values(300))[-1]
    assert chart.wide and "220 classes with the fewest images" in chart.note
    assert "class 299" in chart.svg and "class 219<" not in chart.svg


@pytest.mark.parametrize("key", ["sizes", "tags_per_image", "cooccurrence"])
def test_what_is_unknown_is_left_out(key) -> None:
    check = values()
    del check[key]
    assert len(portrait(check)) == 2


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(values(), junk)))
def test_a_damaged_check_file_is_no_error(check) -> None:
    portrait({**values(), **check})


def test_the_page_of_a_check(tmp_path: Path) -> None:
    report = check(make_collection(tmp_path / "data"))
    path = tmp_path / "out" / "check.html"
    write_check_page(report, path)
    page = Page(path)
    assert page.tags["svg"] == 3 and page.tags["script"] == 0 and page.tags["b"] == 0
    assert "tiny & co" in page.text and "<b>x" in page.text
    for problem in report.problems:
        assert problem.message in page.text
    assert "http:" not in page.source and "https:" not in page.source


def test_the_report_of_a_run_draws_it_too(bench: Workbench) -> None:
    bench.check()
    page = written(bench)
    assert "Classes that come together" in page.text and page.tags["svg"] == 3
    file = bench.run.stage_folder("check") / "check.json"
    older = json.loads(file.read_text())
    del older["tags_per_image"]
    file.write_text(json.dumps(older))
    assert written(bench).tags["svg"] == 2
