"""Charts: round ticks, everything inside the frame, labels escaped."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.report.charts import Mark, Series, histogram, line_chart, round_ticks

number = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.83, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (0, 1180, [0, 250, 500, 750, 1000]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(wanted)


@settings(max_examples=40, deadline=None)
@given(number, st.floats(1e-3, 1e6))
def test_ticks_stay_inside(low: float, length: float) -> None:
    ticks = round_ticks(low, low + length)
    slack = 1e-6 * max(1.0, abs(low) + length)
    assert ticks == sorted(ticks)
    assert len(ticks) <= 7
    assert all(low - slack <= tick <= low + length + slack for tick in ticks)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(number, number), min_size=1, max_size=60), st.booleans())
def test_lines_stay_inside_the_picture(points: list[tuple[float, float]], smooth: bool) -> None:
    svg = line_chart([Series("a", sorted(points))], x_label="x", y_label="y", smooth=smooth)
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(v) for v in root.attrib["viewBox"].split())
    for line in root.iter("polyline"):
        for place in line.attrib["points"].split():
            x, y = (float(v) for v in place.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_labels_are_escaped() -> None:
    svg = line_chart(
        [Series("<a>", [(0, 1), (1, 2)])], x_label="<x>", y_label="<y>", marks=[Mark(0.5, "<m>")]
    )
    texts = " ".join(ElementTree.fromstring(svg).itertext())
    for label in ("<a>", "<x>", "<y>", "<m>"):
        assert label in texts


def test_nothing_to_draw() -> None:
    assert line_chart([Series("a", [])], x_label="x", y_label="y") == ""
    assert histogram([], x_label="x", y_label="y") == ""
    assert histogram([0, 0], x_label="x", y_label="y") == ""


def test_colours_belong_to_names_even_if_a_line_is_empty() -> None:
    svg = line_chart([Series("a", []), Series("b", [(0, 1), (1, 2)])], x_label="x", y_label="y")
    assert re.findall(r"line s(\d)", svg) == ["1"]


def test_a_towering_bar_is_cut_off_and_says_its_value() -> None:
    svg = histogram([800, *[200 / 63] * 63], x_label="score", y_label="share")
    assert "▲ 80%" in svg
    bars = [b for b in ElementTree.fromstring(svg).iter("rect") if b.get("class") == "bar"]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert len(bars) == 64
    assert heights[0] < 1.5 * heights[1]


def test_hovering_names_the_values() -> None:
    lines = [Series("IoU", [(0.0, 0.25), (0.5, 0.5)]), Series("FP", [(0.5, 0.125)])]
    svg = line_chart(lines, x_label="threshold", y_label="share", percent=True)
    titles = [t.text for t in ElementTree.fromstring(svg).iter("title")]
    assert titles == ["threshold 0\nIoU: 25 %", "threshold 0.5\nIoU: 50 %\nFP: 12.5 %"]
