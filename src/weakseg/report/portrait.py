"""The picture of a collection: charts of what the check counted, in a run's report or alone.

Everything is drawn from ``check.json``; no image is opened again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from weakseg.data.check import CheckReport
from weakseg.report.charts import COLOURS, Chart, bar_chart, bubble_chart, matrix_chart
from weakseg.report.facts import entries, number

__all__ = ["ClassBar", "class_bars", "portrait", "problem_rows", "size_words", "write_check_page"]

_BARS = 60  # classes in the chart of the data
_CELLS = 80  # classes in the matrix
_WIDE = 30  # classes from which the matrix takes the whole width
_ITEMS = 8  # items of one problem
_BINS = 60  # places along each axis of the sizes
_MANY = 8  # tags of one image; more are counted together


@dataclass(frozen=True)
class ClassBar:
    """Images of a class by split, with the share of the longest bar."""

    name: str
    counts: list[tuple[str, int, float]]


def class_bars(
    classes: Sequence[str], counts: dict[str, dict[str, int]]
) -> tuple[list[ClassBar], int]:
    """All classes in order, or the rarest of very many; and how many more there are.

    Args:
        classes: Names in the order of mask ids.
        counts: Split -> class -> images.
    """
    longest = max((n for c in counts.values() for n in c.values()), default=0) or 1
    names = list(classes)
    if len(names) > _BARS:
        names = sorted(names, key=lambda name: sum(c.get(name, 0) for c in counts.values()))[:_BARS]
    bars = [
        ClassBar(
            name,
            [(s, c.get(name, 0), round(c.get(name, 0) / longest, 4)) for s, c in counts.items()],
        )
        for name in names
    ]
    return bars, len(classes) - len(bars)


def size_words(check: dict[str, Any]) -> str:
    """The sizes of the images in a few words; empty where none is known."""
    known = _known_sizes(check)
    if not known:
        return ""
    heights, widths = [h for h, _ in known], [w for _, w in known]
    if min(heights) == max(heights) and min(widths) == max(widths):
        return f"all images are {widths[0]:.0f} × {heights[0]:.0f} pixels"
    return (
        f"images are {min(widths):.0f} to {max(widths):.0f} pixels wide and {min(heights):.0f} to "
        f"{max(heights):.0f} high, typically {median(widths):.0f} × {median(heights):.0f}"
    )


def problem_rows(check: dict[str, Any]) -> list[dict[str, Any]]:
    """The problems, ready for the table."""
    rows = []
    for problem in entries(check, "problems"):
        if not isinstance(problem, dict):
            continue
        items = [str(item) for item in entries(problem, "items")]
        rows.append(
            {
                "severity": str(problem.get("severity", "warning")),
                "message": str(problem.get("message", "")),
                "mend": str(problem.get("mend", "")),
                "items": items[:_ITEMS],
                "more": max(0, len(items) - _ITEMS),
            }
        )
    return rows


def portrait(check: dict[str, Any]) -> list[Chart]:
    """Tags of an image, sizes, and which classes come together; what is unknown is left out."""
    charts = (_tags_chart(check), _sizes_chart(check), _together_chart(check))
    return [chart for chart in charts if chart is not None and chart.svg]


def write_check_page(report: CheckReport, path: Path) -> None:
    """Writes the findings of a check as one HTML file that needs nothing else."""
    from weakseg.report.page import render, write_text

    check = report.to_dict()
    bars, hidden = class_bars(report.classes, report.images_per_class)
    errors, warnings = len(report.errors), len(report.warnings)
    context = {
        "name": report.name,
        "classes": len(report.classes),
        "images": sum(report.images_per_split.values()),
        "tag_source": report.tag_source,
        "notes": report.notes,
        "errors": errors,
        "warnings": warnings,
        "splits": [(s, n, report.negatives.get(s, 0)) for s, n in report.images_per_split.items()],
        "bars": bars,
        "hidden_bars": hidden,
        "sizes": size_words(check),
        "problems": problem_rows(check),
        "portrait": portrait(check),
    }
    write_text(path, render("check.html.j2", context))


# --- charts ---------------------------------------------------------------------------------


def _tags_chart(check: dict[str, Any]) -> Chart | None:
    given = check.get("tags_per_image")
    counts = {
        str(split): [int(number(n) or 0) for n in values]
        for split, values in (given.items() if isinstance(given, dict) else ())
        if isinstance(values, list)
    }
    counts = {split: values for split, values in counts.items() if sum(values)}
    if not counts:
        return None
    length = min(max(map(len, counts.values())), _MANY + 1)
    names = [str(i) for i in range(length)]
    series = []
    for split, values in counts.items():
        pooled = [*values[: length - 1], sum(values[length - 1 :])]
        pooled += [0] * (length - len(pooled))
        series.append((split, [n / sum(values) for n in pooled]))
    if max(map(len, counts.values())) > length:
        names[-1] += "+"
    total = sum(map(sum, counts.values()))
    mean = sum(i * n for values in counts.values() for i, n in enumerate(values)) / total
    return Chart(
        "Tags of an image",
        bar_chart(names, series, x_label="tags", y_label="share of images"),
        [(split, i % COLOURS) for i, split in enumerate(counts)],
        f"{mean:.2f} on average. Images with one tag, or none, are those that tell classes apart.",
    )


def _sizes_chart(check: dict[str, Any]) -> Chart | None:
    known = _known_sizes(check)
    if not known:
        return None
    ends = _end([w for _, w in known]), _end([h for h, _ in known])
    bins = Counter(
        (
            round(min(w, ends[0]) / ends[0] * _BINS) * ends[0] / _BINS,
            round(min(h, ends[1]) / ends[1] * _BINS) * ends[1] / _BINS,
        )
        for h, w in known
    )
    beyond = sum(w > ends[0] or h > ends[1] for h, w in known)
    note = "The larger a disc, the more images have about that size."
    if beyond:
        note += f" At the edge: {beyond:,} of more pixels than the axes show."
    svg = bubble_chart(
        [(x, y, n) for (x, y), n in bins.items()],
        x_label="width in pixels",
        y_label="height in pixels",
        unit="images",
        ends=ends,
    )
    return Chart("Sizes of the images", svg, note=note)


def _together_chart(check: dict[str, Any]) -> Chart | None:
    names = [str(name) for name in entries(check, "classes")]
    matrix = [
        [number(n) or 0.0 for n in row] if isinstance(row, list) else []
        for row in entries(check, "cooccurrence")
    ]
    if len(names) < 2 or len(matrix) != len(names) or any(len(r) != len(names) for r in matrix):
        return None
    shown = sorted(sorted(range(len(names)), key=lambda i: -matrix[i][i])[:_CELLS])
    left_out = len(names) - len(shown)
    note = (
        "The darker a cell, the more of the images of its row's class show the column's class too: "
        "tags can hardly tell the two apart where it is darkest."
    )
    if left_out:
        note += f" The {left_out:,} classes with the fewest images are not shown."
    svg = matrix_chart(
        [names[i] for i in shown],
        [[matrix[i][j] for j in shown] for i in shown],
        verb="with",
        unit="images",
    )
    return Chart("Classes that come together", svg, note=note, wide=len(shown) > _WIDE)


def _known_sizes(check: dict[str, Any]) -> list[tuple[float, float]]:
    sizes = check.get("sizes")
    return [
        (float(size[0]), float(size[1]))
        for size in (sizes.values() if isinstance(sizes, dict) else ())
        if isinstance(size, list) and len(size) == 2 and all(number(v) for v in size)
    ]


def _end(values: Sequence[float]) -> float:
    """End of an axis: the largest value, unless a few are far beyond all others."""
    usual = sorted(values)[int(0.95 * (len(values) - 1))]
    return 1.06 * (max(values) if max(values) <= 3 * usual else 1.5 * usual)
