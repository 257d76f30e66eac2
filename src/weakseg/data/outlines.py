"""Outlines of objects, as COCO files hold them, to pixels: polygons and run lengths.

A pixel belongs to a polygon where its centre lies inside, by the even-odd rule; a pixel's centre is
at (x + 0.5, y + 0.5). Run lengths go down the columns, first those of the background; compressed
ones are text (the format of the COCO API). Only run lengths can express holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["fill_polygons", "read_runs", "run_lengths"]


def fill_polygons(parts: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, True inside any of the polygons.

    Args:
        parts: Polygons as flat lists ``x, y, x, y, ...`` in pixels, each closed by itself; what
            lies outside of the image is cut off.
        size: (H, W) of the image.

    Raises:
        ValueError: A part is no list of at least three points with finite coordinates.
    """
    filled = np.zeros(size, dtype=bool)
    for part in parts:
        try:
            points = np.asarray(part, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a polygon holds something else than numbers") from None
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            raise ValueError("a polygon needs x, y of at least three points")
        _fill(filled, points.reshape(-1, 2))
    return filled


def _fill(filled: np.ndarray, points: np.ndarray) -> None:
    """Adds one polygon: walks all edges, column by column, and toggles what lies below them."""
    height, width = filled.shape
    points = points.clip(
        -1e7, 1e7
    )  # far outside is outside; keeps the integers below from overflow
    x0, x1 = (float(points[:, 0].min()), float(points[:, 0].max()))
    left, right = max(0, _first(x0)), min(width, _first(x1))
    if left >= right:
        return
    start, end = points, np.roll(points, -1, axis=0)
    swap = start[:, :1] > end[:, :1]
    start, end = np.where(swap, end, start), np.where(swap, start, end)
    first = np.ceil(start[:, 0] - 0.5).astype(np.int64).clip(left, right)
    last = np.ceil(end[:, 0] - 0.5).astype(np.int64).clip(left, right)
    number = last - first  # columns whose centre the edge crosses
    edge = np.repeat(np.arange(len(points)), number)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(number) - number, number) + first[edge]
    along = (column + 0.5 - start[edge, 0]) / (end[edge, 0] - start[edge, 0])
    y = start[edge, 1] + along * (end[edge, 1] - start[edge, 1])
    row = np.ceil(y - 0.5).astype(np.int64).clip(0, height)
    top, bottom = (int(row.min()), int(row.max())) if len(row) else (0, 0)
    crossings = np.zeros((bottom - top + 1, right - left), dtype=np.int32)
    np.add.at(crossings, (row - top, column - left), 1)
    inside = np.cumsum(crossings[:-1], axis=0) % 2 == 1
    filled[top:bottom, left:right] |= inside


def _first(x: float) -> int:
    """The first column whose centre is not left of ``x``."""
    return int(np.ceil(x - 0.5))


def read_runs(value: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of COCO's run lengths, ``{"size": [H, W], "counts": ...}``.

    Args:
        value: The object; counts are a list of numbers or text.
        size: (H, W) of the image, which must be the object's own.

    Raises:
        ValueError: Anything does not fit.
    """
    if not isinstance(value, dict) or "counts" not in value:
        raise ValueError("run lengths need 'counts' and 'size'")
    if value.get("size") != [*size]:
        raise ValueError(f"run lengths of size {value.get('size')!r:.40} in an image of {[*size]}")
    counts = value["counts"]
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    whole = isinstance(runs, list) and all(type(n) is int and n >= 0 for n in runs)
    if not whole or sum(runs) != size[0] * size[1]:
        raise ValueError("run lengths that do not fill the image")
    ids = np.arange(len(runs)) % 2 == 1
    return np.repeat(ids, runs).reshape(size[1], size[0]).T


def run_lengths(text: str) -> list[int]:
    """Run lengths from COCO's compressed text.

    Each character holds five bits of a number, the lowest first, and says whether more follow; from
    the fourth number on, the difference to the one before the last is stored.

    Raises:
        ValueError: The text is damaged.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text.encode("ascii", "replace"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("damaged text of run lengths")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError("the text of run lengths ends too early")
    return runs
