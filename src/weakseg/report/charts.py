"""Charts as inline SVG: no script, no library; colours come from the page's style sheet.

Lines carry the classes ``s0`` .. ``s5``, so that one page can be light and dark. Hovering over a
chart names the values at that place (an SVG ``<title>`` on an invisible strip).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean

from markupsafe import Markup, escape

__all__ = [
    "Chart",
    "Cloud",
    "Mark",
    "Series",
    "bar_chart",
    "bubble_chart",
    "histogram",
    "line_chart",
    "matrix_chart",
    "round_ticks",
    "scatter_chart",
]

COLOURS = 6
"""Number of series colours that the style sheet knows."""

_WIDTH = 460.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 20.0, 30.0, 44.0
_LETTER = 7.5  # about the width of a letter of a mark's label
_BOLD = 8.2  # and of a dot's
_NAME = 18  # letters of a name beside a matrix
_STRIPS = 120  # places of a chart that answer to hovering


@dataclass(frozen=True)
class Chart:
    """A chart with its title, legend (name, number of the colour) and a sentence."""

    title: str
    svg: Markup
    legend: list[tuple[str, int]] = field(default_factory=list)
    note: str = ""
    oracle: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Series:
    """A named line; points in increasing order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A vertical line with a label; ``kind`` is ``chosen`` or ``oracle``."""

    x: float
    label: str
    kind: str = "chosen"


@dataclass(frozen=True)
class Cloud:
    """Named points, shown by their mean; ``colour`` is its number."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0

    @property
    def mean(self) -> tuple[float, float]:
        """Of all points."""
        return fmean(x for x, _ in self.points), fmean(y for _, y in self.points)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
    percent: bool = False,
    smooth: bool = False,
    height: float = 250.0,
) -> Markup:
    """Lines over a common axis.

    Args:
        series: Empty ones keep their colour but are not drawn.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        x_range: Fixed ends of the axis, else those of the data.
        y_range: Likewise; else from 0 (or below, if the data are) to above the largest value.
        marks: Vertical lines.
        percent: Show y, a share in [0, 1], as percent.
        smooth: Draw a running mean strongly and the values faintly, where there are many.
        height: In units of the picture, which is 460 wide.

    Returns:
        SVG, empty where there is nothing to draw.
    """
    drawn = [(i, s) for i, s in enumerate(series) if s.points]
    if not drawn:
        return Markup("")
    xs = [x for _, s in drawn for x, _ in s.points]
    ys = [y for _, s in drawn for _, y in s.points]
    frame = _Frame(
        x_range or (min(xs), max(xs)), y_range or _from_zero(ys, smooth), height, percent=percent
    )
    parts = [frame.axes(x_label, y_label)]
    for index, line in drawn:
        parts.append(_line(frame, line.points, index % COLOURS, smooth))
    parts.append(frame.marks(marks))
    parts.append(_strips(frame, [s for _, s in drawn], x_label))
    return frame.svg(parts, f"{y_label} over {x_label}")


def histogram(
    counts: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    bins: int = 64,
    height: float = 250.0,
) -> Markup:
    """Bars of shares over [0, 1]; a bar far above all others is cut off and says its value.

    Args:
        counts: Evenly spaced over [0, 1].
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        marks: Vertical lines.
        bins: Neighbouring counts are pooled to this many bars at most.
        height: In units of the picture, which is 460 wide.
    """
    shares = _pooled(counts, bins)
    if not shares:
        return Markup("")
    top = _top_of(shares)
    frame = _Frame((0.0, 1.0), (0.0, top), height, percent=True)
    parts = [frame.axes(x_label, y_label)]
    parts += [_bar(frame, i, len(shares), share) for i, share in enumerate(shares)]
    peaks = _peaks(frame, shares, top)
    parts += [*peaks, frame.marks(marks, first_row=len(peaks[:1]))]
    return frame.svg(parts, f"{y_label} over {x_label}")


def bar_chart(
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    height: float = 250.0,
) -> Markup:
    """Groups of bars of shares, one group for each name, one bar in it for each series.

    Args:
        names: What stands below each group.
        series: Name and one share in [0, 1] for each group.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        height: In units of the picture, which is 460 wide.
    """
    top = max((value for _, values in series for value in values), default=0.0)
    if not names or not top:
        return Markup("")
    frame = _Frame((0.0, len(names)), (0.0, 1.12 * top), height, percent=True)
    parts = [frame.axes(x_label, y_label, x_ticks=[(i + 0.5, n) for i, n in enumerate(names)])]
    width = (frame.right - frame.left) / len(names) * 0.8 / len(series)
    for i, name in enumerate(names):
        left = frame.x(i + 0.1)
        for k, (_, values) in enumerate(series):
            at = frame.y(values[i])
            parts.append(
                Markup('<rect class="f{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                    k % COLOURS, _n(left + k * width), _n(at), _n(width), _n(frame.bottom - at)
                )
            )
        lines = [f"{s}: {frame.y_text(values[i])}" for s, values in series]
        parts.append(frame.strip(frame.x(i), frame.x(i + 1), [f"{x_label} {name}", *lines]))
    return frame.svg(parts, f"{y_label} over {x_label}")


def bubble_chart(
    bubbles: Sequence[tuple[float, float, int]],
    *,
    x_label: str,
    y_label: str,
    unit: str,
    ends: tuple[float, float],
    height: float = 250.0,
) -> Markup:
    """Discs at (x, y) whose area grows with a count; what lies beyond the ends is at the edge.

    Args:
        bubbles: (x, y, count).
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        unit: What is counted.
        ends: Largest x and y of the axes, which start at 0.
        height: In units of the picture, which is 460 wide.
    """
    total = sum(count for *_, count in bubbles)
    if not total:
        return Markup("")
    frame = _Frame((0.0, ends[0]), (0.0, ends[1]), height, percent=False)
    parts = [frame.axes(x_label, y_label)]
    for x, y, count in sorted(bubbles, key=lambda b: -b[2]):  # small discs above large ones
        parts.append(
            Markup(
                '<circle class="bubble" cx="{}" cy="{}" r="{}"><title>{} × {}: {} {}</title></circle>'
            ).format(
                _n(frame.x(x)),
                _n(frame.y(y)),
                _n(1.5 + 10 * math.sqrt(count / total)),
                f"{x:.0f}",
                f"{y:.0f}",
                f"{count:,}",
                unit,
            )
        )
    return frame.svg(parts, f"{y_label} over {x_label}")


def scatter_chart(
    clouds: Sequence[Cloud],
    *,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    x_percent: bool = False,
    height: float = 300.0,
) -> Markup:
    """A named dot at the mean of each cloud; where it has several points, these are faint.

    Args:
        clouds: y are shares in [0, 1]; empty clouds are left out.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        x_range: Fixed ends of the axis, else around the data.
        x_percent: x are shares too.
        height: In units of the picture, which is 460 wide.
    """
    drawn = [cloud for cloud in clouds if cloud.points]
    if not drawn:
        return Markup("")
    xs = [x for cloud in drawn for x, _ in cloud.points]
    ys = [y for cloud in drawn for _, y in cloud.points]
    frame = _Frame(x_range or _around(xs), _around(ys), height, percent=True)
    ticks = [(v, _tick(v, x_percent)) for v in round_ticks(frame.x_low, frame.x_high)]
    parts = [frame.axes(x_label, y_label, ticks)]
    for cloud in drawn:
        for x, y in cloud.points if len(cloud.points) > 1 else ():
            parts.append(_dot(frame, x, y, f"dot faint s{cloud.colour % COLOURS}", 3))
    taken = [_box(frame.x(x), frame.y(y), 7, 7) for x, y in (cloud.mean for cloud in drawn)]
    for cloud in drawn:
        x, y = cloud.mean
        words = f"{cloud.name}: {x_label} {_tick(x, x_percent)}, {y_label} {_tick(y, True)}"
        parts.append(_dot(frame, x, y, f"dot s{cloud.colour % COLOURS}", 5, words))
        label, box = _placed(frame, cloud.name, frame.x(x), frame.y(y), taken)
        taken.append(box)
        parts.append(label)
    return frame.svg(parts, f"{y_label} over {x_label}")


def matrix_chart(
    names: Sequence[str], counts: Sequence[Sequence[float]], *, verb: str, unit: str
) -> Markup:
    """A square of cells; each as dark as the share of its row's diagonal that it holds.

    Args:
        names: Of rows and columns.
        counts: (K, K); the diagonal holds the totals of the rows.
        verb: What a row does to a column, such as ``with``.
        unit: What is counted.

    Returns:
        SVG whose width in units grows with K, so that names stay readable: it needs 460 pixels
        for 20 classes and 1,100 for 80.
    """
    if not names:
        return Markup("")
    cell, letter = 13.0, 5.9
    margin = 10 + letter * min(max(map(len, names)), _NAME)
    side = margin + cell * len(names)
    parts = []
    for i, name in enumerate(names):
        middle = margin + cell * (i + 0.5)
        shown = name if len(name) <= _NAME else name[: _NAME - 1] + "…"
        parts.append(_text(margin - 5, middle + 3.5, shown, "end", "small"))
        parts.append(
            Markup('<text class="small" transform="translate({} {}) rotate(-90)">{}</text>').format(
                _n(middle + 3.5), _n(margin - 5), shown
            )
        )
        parts.append(
            Markup('<rect class="none" x="{0}" y="{0}" width="{1}" height="{1}"/>').format(
                _n(margin + cell * i), _n(cell)
            )
        )
        for j, other in enumerate(names):
            share = counts[i][j] / counts[i][i] if counts[i][i] and i != j else 0.0
            if share >= 0.005:
                words = f"{name} {verb} {other}: {counts[i][j]:,.0f} of {counts[i][i]:,.0f} {unit}"
                parts.append(
                    Markup(
                        '<rect class="cell" x="{}" y="{}" width="{}" height="{}" '
                        'fill-opacity="{}"><title>{} ({})</title></rect>'
                    ).format(
                        _n(margin + cell * j),
                        _n(margin + cell * i),
                        _n(cell),
                        _n(cell),
                        # A square root: most shares are small, and 3 % should be seen.
                        f"{min(1.0, share) ** 0.5:.2f}",
                        words,
                        f"{100 * share:.0f} %",
                    )
                )
    parts.append(
        Markup('<rect class="frame" x="{0}" y="{0}" width="{1}" height="{1}"/>').format(
            _n(margin), _n(cell * len(names))
        )
    )
    return Markup(
        '<svg class="plot matrix" viewBox="0 0 {0} {0}" style="max-width:{1}px" role="img" '
        'aria-label="{2}">{3}</svg>'
    ).format(
        _n(side + 1), round(1.25 * side), f"shares of {unit} {verb} others", Markup("").join(parts)
    )


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
    if not high - low > 1e-300:  # denormal steps have no logarithm
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


# --- axes -----------------------------------------------------------------------------------


class _Frame:
    """Scales, axes and everything that needs both."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        height: float,
        *,
        percent: bool,
    ) -> None:
        self.x_low, self.x_high = _widened(*x_range)
        self.y_low, self.y_high = _widened(*y_range)
        self.height, self.percent = height, percent
        self.left, self.right = _LEFT, _WIDTH - _RIGHT
        self.top, self.bottom = _TOP, height - _BOTTOM

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.left + min(max(share, 0.0), 1.0) * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)

    def y_text(self, value: float) -> str:
        return f"{100 * value:.4g} %" if self.percent else f"{value:.4g}"

    def axes(
        self, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]] | None = None
    ) -> Markup:
        parts = []
        for value in round_ticks(self.y_low, self.y_high, max(2, int(self.height // 55))):
            at = _n(self.y(value))
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    _n(self.left), _n(self.right), at, at
                )
                + _text(self.left - 7, self.y(value) + 4, _tick(value, self.percent), "end")
            )
        if x_ticks is None:
            x_ticks = [(v, _tick(v, False)) for v in round_ticks(self.x_low, self.x_high)]
        for value, text in x_ticks:
            parts.append(_text(self.x(value), self.bottom + 17, text, "middle"))
        parts.append(
            Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _n(self.left), _n(self.right), _n(self.bottom), _n(self.bottom)
            )
        )
        parts.append(_text((self.left + self.right) / 2, self.height - 7, x_label, "middle", "lab"))
        parts.append(_text(2, 13, y_label, "start", "lab"))
        return Markup("").join(parts)

    def marks(self, marks: Sequence[Mark], first_row: int = 0) -> Markup:
        """All lines below all labels, each label in a row of its own."""
        lines = [self._mark_line(mark) for mark in marks]
        labels = [
            self._mark_label(mark, row, [self.x(m.x) for m in marks])
            for row, mark in enumerate(marks, first_row)
        ]
        return Markup("").join(lines + labels)

    def _mark_label(self, mark: Mark, row: int, places: Sequence[float]) -> Markup:
        at = self.x(mark.x)
        length = 6 + _LETTER * len(mark.label)
        taken = any(0 < place - at < length for place in places) and at - self.left > length
        left_of = taken or at + length > self.right
        return _text(
            at - 6 if left_of else at + 6,
            self.top + 12 + 18 * row,
            mark.label,
            "end" if left_of else "start",
            f"marklab {escape(mark.kind)}",
        )

    def _mark_line(self, mark: Mark) -> Markup:
        at = self.x(mark.x)
        return Markup('<line class="mark {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            mark.kind, _n(at), _n(at), _n(self.top), _n(self.bottom)
        )

    def strip(self, low: float, high: float, lines: Iterable[str]) -> Markup:
        """An invisible place that shows lines of text when hovered over."""
        return Markup(
            '<rect class="hit" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
        ).format(
            _n(low), _n(self.top), _n(high - low), _n(self.bottom - self.top), "\n".join(lines)
        )

    def svg(self, parts: Iterable[Markup], label: str) -> Markup:
        return Markup(
            '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        ).format(_n(_WIDTH), _n(self.height), label, Markup("").join(parts))


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, _n(x), _n(y), anchor, text
    )


def _tick(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


# --- lines ----------------------------------------------------------------------------------


def _line(
    frame: _Frame, points: Sequence[tuple[float, float]], colour: int, smooth: bool
) -> Markup:
    if len(points) == 1:
        x, y = points[0]
        return Markup('<circle class="dot s{}" cx="{}" cy="{}" r="3"/>').format(
            colour, _n(frame.x(x)), _n(frame.y(y))
        )
    if not smooth or len(points) < 40:
        return _path(frame, points, f"line s{colour}")
    faint = _path(frame, points, f"line faint s{colour}")
    return faint + _path(frame, _running_mean(points), f"line s{colour}")


def _path(frame: _Frame, points: Iterable[tuple[float, float]], kind: str) -> Markup:
    places = " ".join(f"{_n(frame.x(x))},{_n(frame.y(y))}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(kind, places)


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window around each point, cut off at the ends."""
    reach = max(2, len(points) // 25)
    mean = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        mean.append((x, sum(window) / len(window)))
    return mean


def _from_zero(values: Sequence[float], smooth: bool) -> tuple[float, float]:
    """From zero to above the largest value; for noisy curves, single spikes may leave the top."""
    ordered = sorted(values)
    low = min(ordered[0], 0.0)
    high = ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))] if smooth else ordered[-1]
    high = max(high, low)
    return low, high + 0.08 * (high - low) if high > low else low + 1.0


def _strips(frame: _Frame, series: Sequence[Series], x_label: str) -> Markup:
    values = [dict(s.points) for s in series]
    places = sorted({x for v in values for x in v})
    every = math.ceil(len(places) / _STRIPS)
    places = places[:: max(every, 1)]
    edges = [(a + b) / 2 for a, b in zip(places, places[1:], strict=False)]
    bounds = [frame.left, *(frame.x(e) for e in edges), frame.right]
    strips = []
    for i, place in enumerate(places):
        lines = [f"{x_label} {_tick(place, False)}"]
        for line, known in zip(series, values, strict=True):
            if place in known:
                lines.append(f"{line.name}: {frame.y_text(known[place])}")
        strips.append(frame.strip(bounds[i], bounds[i + 1], lines))
    return Markup("").join(strips)


# --- bars -----------------------------------------------------------------------------------


def _pooled(counts: Sequence[float], bins: int) -> list[float]:
    total = sum(counts)
    if not total:
        return []
    step = max(1, math.ceil(len(counts) / bins))
    return [sum(counts[i : i + step]) / total for i in range(0, len(counts), step)]


def _top_of(shares: Sequence[float]) -> float:
    """Height of the axis: that of the third-highest bar where one or two tower over the rest."""
    ordered = sorted(shares, reverse=True)
    usual = ordered[min(2, len(ordered) - 1)]
    return 1.35 * usual if usual > 0 and ordered[0] > 2.5 * usual else 1.12 * ordered[0]


def _bar(frame: _Frame, index: int, bars: int, share: float) -> Markup:
    left, right = frame.x(index / bars), frame.x((index + 1) / bars)
    height = frame.bottom - frame.y(share)
    bar = Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>').format(
        _n(left + 0.4), _n(frame.bottom - height), _n(right - left - 0.8), _n(height)
    )
    range_text = f"{index / bars:.2f} to {(index + 1) / bars:.2f}"
    return bar + frame.strip(left, right, [range_text, f"{100 * share:.2f} %"])


def _peaks(frame: _Frame, shares: Sequence[float], top: float) -> list[Markup]:
    """What bars that leave the top would reach; neighbours are summed up in one label."""
    labels = []
    for tall, group in groupby(enumerate(shares), key=lambda pair: pair[1] > top):
        places = list(group)
        if not tall:
            continue
        first, last = places[0][0] / len(shares), (places[-1][0] + 1) / len(shares)
        text = f"▲ {100 * sum(share for _, share in places):.0f}%"
        at, anchor = (frame.x(first) - 4, "end") if first > 0.5 else (frame.x(last) + 4, "start")
        labels.append(_text(at, frame.top + 12, text, anchor, "marklab peak"))
    return labels


# --- dots -----------------------------------------------------------------------------------

_Box = tuple[float, float, float, float]


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis with room for labels on both sides."""
    room = max(0.2 * (max(values) - min(values)), 0.01)
    return max(min(values) - room, 0.0), max(values) + room


def _dot(frame: _Frame, x: float, y: float, kind: str, radius: float, words: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(words) if words else Markup("")
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}">{}</circle>').format(
        kind, _n(frame.x(x)), _n(frame.y(y)), _n(radius), title
    )


def _box(x: float, y: float, width: float, height: float) -> _Box:
    """Left, top, right and bottom around a middle."""
    return x - width, y - height, x + width, y + height


def _placed(
    frame: _Frame, name: str, x: float, y: float, taken: Sequence[_Box]
) -> tuple[Markup, _Box]:
    """The label of a dot where it covers the least of dots and other labels, and its box."""
    half = _BOLD * len(name) / 2
    places = [
        (x + 9, y + 4, "start", _box(x + 9 + half, y, half, 8)),
        (x - 9, y + 4, "end", _box(x - 9 - half, y, half, 8)),
        (x, y - 10, "middle", _box(x, y - 14, half, 8)),
        (x, y + 19, "middle", _box(x, y + 15, half, 8)),
        (x + 9, y - 9, "start", _box(x + 9 + half, y - 13, half, 8)),
        (x + 9, y + 18, "start", _box(x + 9 + half, y + 14, half, 8)),
        (x - 9, y - 9, "end", _box(x - 9 - half, y - 13, half, 8)),
        (x - 9, y + 18, "end", _box(x - 9 - half, y + 14, half, 8)),
    ]
    page = (0.0, frame.top - 8, _WIDTH, frame.bottom)

    def cost(box: _Box) -> float:
        whole = (box[2] - box[0]) * (box[3] - box[1])
        return whole - _shared(box, page) + sum(_shared(box, other) for other in taken)

    left, top, anchor, box = min(places, key=lambda place: cost(place[3]))
    return _text(left, top, name, anchor, "marklab"), box


def _shared(a: _Box, b: _Box) -> float:
    """Area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
