"""How files with more than 8 bits, or with more bands than colours, become 8-bit RGB.

8 bits hold 0 to 255 and are taken as they are. Values of more bits say nothing of their own
range: a 12-bit camera stores 0 to 4095 in files of 16 bits. So the range is found once, for all
images of a collection, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Depth", "Reading", "Spread", "fitting_depth", "pooled", "scaled", "spread"]

Depth = int | tuple[float, float]
"""Bits (12: the values 0 to 4095), or the two values that become 0 and 255."""

_BITS = (8, 10, 12, 14, 16)
_FITS = 0.25  # share of a depth's range that most values must span, else it is no depth of theirs
_TAILS = (0.1, 99.9)  # percentiles
_LOOKED_AT = 2**14  # values of an image that its percentiles are taken from


@dataclass(frozen=True, slots=True)
class Reading:
    """How pixels become 8-bit RGB, the same for all images of a collection.

    Attributes:
        depth: Range of values of more than 8 bits; ``None``: that of each image by itself. It does
            not concern files of 8 bits.
        bands: Bands of the file, counted from 1, that become red, green and blue, or the one that
            becomes gray; others are ignored. ``"alpha"``: the last one of two or four is
            transparency, and images are laid on white by it; ``None`` does the same, and says that
            nobody has decided it.
    """

    depth: Depth | None = None
    bands: tuple[int, ...] | Literal["alpha"] | None = None

    @property
    def limits(self) -> tuple[float, float] | None:
        """Values that become 0 and 255."""
        if self.depth is None or isinstance(self.depth, tuple):
            return self.depth
        return 0, 2**self.depth - 1

    @property
    def chosen(self) -> tuple[int, ...] | None:
        """The bands to read, counted from 1; ``None`` where a further one may be transparency."""
        return self.bands if isinstance(self.bands, tuple) else None

    def decides(self) -> tuple[Any, ...]:
        """What other pixels come from; empty for what is read the same way without it."""
        return () if self.depth is None and self.chosen is None else (self.limits, self.chosen)


@dataclass(frozen=True, slots=True)
class Spread:
    """What the values of some images are.

    Attributes:
        least: Smallest value.
        most: Largest value.
        looked_at: (N,) float64, some of the values, for percentiles.
        floating: Whether they are stored as floats.
    """

    least: float
    most: float
    looked_at: np.ndarray
    floating: bool


def spread(values: np.ndarray) -> Spread | None:
    """The spread of an array of any shape; ``None`` where it holds no finite value."""
    floating = values.dtype.kind == "f"
    flat = values.reshape(-1)
    if floating:
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        return None
    looked_at = flat[:: -(-flat.size // _LOOKED_AT)].astype(np.float64)
    return Spread(float(flat.min()), float(flat.max()), looked_at, floating)


def pooled(spreads: Iterable[Spread]) -> Spread:
    """The spread of all of them together."""
    each = list(spreads)
    return Spread(
        min(s.least for s in each),
        max(s.most for s in each),
        np.concatenate([s.looked_at for s in each]),
        any(s.floating for s in each),
    )


def fitting_depth(found: Spread) -> Depth:
    """The smallest depth that holds all values: 8, 10, 12, 14 or 16 bits, or 0 to 1 for floats.

    Where 99.8 % of the values span less than a quarter of it (thermal cameras, counts, values in
    physical units, single hot pixels), or where no depth holds them, the percentiles .1 and 99.9
    are the range.
    """
    # Towards the middle, so that a single odd value of a small image is left out too.
    low = float(np.percentile(found.looked_at, _TAILS[0], method="higher"))
    high = float(np.percentile(found.looked_at, _TAILS[1], method="lower"))
    candidates: list[Depth] = [(0.0, 1.0)] * found.floating + list(_BITS)
    for depth in candidates:
        limits = Reading(depth).limits
        assert limits is not None
        if found.least >= limits[0] and found.most <= limits[1]:
            if high - low >= _FITS * (limits[1] - limits[0]) or found.least == found.most:
                return depth
            break
    if low == high:  # the few others are all that there is to see
        low, high = found.least, found.most
    if low == high:
        low, high = min(low, 0.0), max(high, 1.0)
    digits = 5 - math.floor(math.log10(high - low))
    return round(low, digits), round(high, digits)


def scaled(values: np.ndarray, depth: Depth) -> np.ndarray:
    """Values of any type as uint8: the depth's range becomes 0 to 255, what lies beyond is clipped.

    What is no number becomes 0.
    """
    limits = Reading(depth).limits
    assert limits is not None
    if values.dtype == np.uint16:  # a table: one look for each pixel
        return _levels(np.arange(2**16), *limits)[values]
    result = np.empty(values.shape, dtype=np.uint8)
    for row in range(len(values)):  # a row at a time keeps the floats small
        result[row] = _levels(values[row], *limits)
    return result


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    share = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(np.rint(np.nan_to_num(share, nan=0.0)), 0, 255).astype(np.uint8)
