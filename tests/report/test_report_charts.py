"""Charts: round ticks, everything inside the frame, labels escaped."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.report.charts import (
    Cloud,
    Mark,
    Series,
    histogram,
    line_chart,
    round_ticks,
    scatter_chart,
)

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
    places = [p.split(",") for line in root.iter("polyline") for p in line.attrib["points"].split()]
    places += [(dot.attrib["cx"], dot.attrib["cy"]) for dot in root.iter("circle")]  # of one point
    assert len(places) >= len(points)
    for x, y in (map(float, place) for place in places):
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


def dots(svg: str, kind: str) -> list[tuple[float, float]]:
    circles = ElementTree.fromstring(svg).iter("circle")
    return [
        (float(c.attrib["cx"]), float(c.attrib["cy"]))
        for c in circles
        if c.attrib["class"].startswith(kind)
    ]


def test_a_cloud_is_a_dot_at_its_mean_and_faint_points() -> None:
    clouds = [Cloud("a", [(1, 0.2), (3, 0.4)]), Cloud("b", [(2, 0.3)], 1), Cloud("none", [])]
    svg = scatter_chart(clouds, x_label="cost", y_label="mIoU", x_range=(0.0, 4.0))
    faint = dots(svg, "dot faint")
    assert len(faint) == 2  # one point alone is its own mean
    (mean_a, mean_b) = dots(svg, "dot s")
    assert mean_a == pytest.approx([sum(p) / 2 for p in zip(*faint, strict=True)], abs=0.11)
    assert mean_b == mean_a
    assert "a: cost 2, mIoU 30%" in svg
    assert scatter_chart([Cloud("none", [])], x_label="x", y_label="y") == ""


def test_labels_of_near_dots_keep_out_of_each_other_and_of_the_edge() -> None:
    clouds = [
        Cloud(f"method {i}", [(40 + 0.2 * i, 0.4 + 0.004 * i)], i) for i in range(3)
    ]  # at the right edge
    svg = scatter_chart(clouds, x_label="x", y_label="y", x_range=(0.0, 41.0))
    spans = []
    for text in ElementTree.fromstring(svg).iter("text"):
        if text.attrib["class"] != "marklab":
            continue
        x, y, width = float(text.attrib["x"]), float(text.attrib["y"]), 7.0 * len(text.text or "")
        left = x - {"start": 0, "middle": width / 2, "end": width}[text.attrib["text-anchor"]]
        spans.append((left, left + width, y))
    assert len(spans) == 3
    assert all(left >= 0 and right <= 460 for left, right, _ in spans)
    for i, (left, right, y) in enumerate(spans):
        for other_left, other_right, other_y in spans[:i]:
            assert right <= other_left or other_right <= left or abs(y - other_y) > 10
