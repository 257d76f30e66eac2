"""Looks into the files of a collection for what their headers do not say: the range of values of
more than 8 bits, and whether a further band is transparency.

Both are decided once for all images, so that each is read like the others, in training and later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from weakseg.data.depth import Depth, Reading, Spread, fitting_depth, pooled, spread
from weakseg.data.images import (
    DECODE_ERRORS,
    band_values,
    colour_bands,
    has_alpha,
    is_deep,
    open_image,
)
from weakseg.data.samples import Sample, lot
from weakseg.data.sources import count
from weakseg.data.tiff import RawTiff
from weakseg.errors import UserError

__all__ = ["find_reading"]

_EIGHT_BITS = frozenset({".jpg", ".jpeg", ".bmp"})  # and no transparency: not opened
_LOOKED_AT = 256  # files of more than 8 bits, and files with transparency, that are decoded
_ENDS = 0.5  # share of the pixels of a band of transparency that are clear or opaque, at least
_OPAQUE = 0.01  # share that are opaque, at least


@dataclass(frozen=True, slots=True)
class _Header:
    """What the header of one file says."""

    sample: Sample
    deep: bool = False
    bands: int = 0  # with the one that is tagged as transparency; 0 where none is


def find_reading(
    samples: Sequence[Sample], given: Reading | None = None
) -> tuple[Reading, list[str]]:
    """How all these images are to be read, and what was found, one sentence each.

    8-bit files without transparency need nothing. Of the others as many as 256 are decoded, drawn
    by a fixed lot. Files that cannot be read are left to the check.

    Args:
        samples: Images.
        given: What is decided already, and not looked for.

    Raises:
        UserError: Some images hold floats and others whole numbers, of different ranges.
    """
    reading = given or Reading()
    if reading.depth is not None and reading.bands is not None:
        return reading, []
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(_header, samples))
    notes: list[str] = []
    clear = _drawn([h for h in headers if h.bands])
    if clear and reading.bands is None:
        reading = replace(reading, bands=_decided(clear, notes))
    deep = [h for h in headers if h.deep]
    if deep and reading.depth is None:
        depth = _depth(_drawn(deep), reading)
        if depth is not None:
            notes.append(_depth_words(len(deep), depth))
            reading = replace(reading, depth=depth)
    return reading, notes


def _drawn(headers: list[_Header]) -> list[_Header]:
    return sorted(headers, key=lambda h: lot(h.sample.id))[:_LOOKED_AT]


def _header(sample: Sample) -> _Header:
    suffix = os.path.splitext(sample.image)[1].lower()
    if suffix in _EIGHT_BITS or _plain_png(sample.image, suffix):
        return _Header(sample)
    try:
        with open_image(sample.image) as image:
            bands = image.bands if isinstance(image, RawTiff) else len(image.getbands())
            alpha = has_alpha(image) and bands in (2, 4)
            return _Header(sample, is_deep(image), bands if alpha else 0)
    except DECODE_ERRORS:
        return _Header(sample)


def _plain_png(path: Path, suffix: str) -> bool:
    """Whether its first bytes say that this is a PNG of 8 bits without a band of transparency;
    ten times as fast as opening it."""
    if suffix != ".png":
        return False
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(26)
    except (OSError, ValueError):
        return True  # the check says what is wrong with it
    return head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] <= 8 and head[25] < 4


# --- transparency ---------------------------------------------------------------------------


def _decided(clear: list[_Header], notes: list[str]) -> tuple[int, ...] | Literal["alpha"] | None:
    """Whether the last bands are transparency, by most of the images that say something."""
    with ThreadPoolExecutor() as pool:
        votes = [v for v in pool.map(_is_transparency, clear) if v is not None]
    if not votes:  # all are opaque: both readings are the same
        return None
    last = "fourth" if any(h.bands == 4 for h in clear) else "second"
    if 2 * sum(votes) >= len(votes):
        notes.append(
            f"The {last} band of images is transparency: they are laid on white by it (data.bands: "
            f"[{'1, 2, 3' if last == 'fourth' else '1'}] ignores it)."
        )
        return "alpha"
    bands = (1, 2, 3) if last == "fourth" else (1,)
    shown = ", ".join(map(str, bands))
    notes.append(
        f"The {last} band of images is tagged as transparency, but holds data: it is ignored "
        f"(data.bands: [{shown}]; data.bands: alpha lays images on white by it)."
    )
    return bands


def _is_transparency(header: _Header) -> bool | None:
    """Whether the last band of one file looks like transparency; None where all of it is opaque.

    That of a photograph cuts something out: most pixels are clear or opaque. Another channel of a
    sensor takes all values, and an empty one leaves nothing to see.
    """
    try:
        with open_image(header.sample.image) as image:
            band = band_values(image)[..., -1]
    except DECODE_ERRORS:
        return None
    most = np.iinfo(band.dtype).max if band.dtype.kind in "ui" else 1
    opaque, clear = float((band == most).mean()), float((band == 0).mean())
    return None if opaque == 1 else opaque + clear >= _ENDS and opaque >= _OPAQUE


# --- range of values ------------------------------------------------------------------------


def _depth(deep: list[_Header], reading: Reading) -> Depth | None:
    with ThreadPoolExecutor() as pool:
        found = [s for s in pool.map(lambda h: _spread(h, reading), deep) if s is not None]
    if not found:
        return None
    depths = {
        kind: fitting_depth(pooled(s for s in found if s.floating == kind))
        for kind in {s.floating for s in found}
    }
    if len(set(depths.values())) > 1:
        raise UserError(
            f"some images hold floats ({_range_words(depths[True])}) and others whole numbers of "
            f"more than 8 bits ({_range_words(depths[False])}), so that no range fits both",
            where="data.depth",
            mend="save all images in one of the two ways",
        )
    return next(iter(depths.values()))


def _spread(header: _Header, reading: Reading) -> Spread | None:
    try:
        with open_image(header.sample.image) as image:
            alpha = image.alpha if isinstance(image, RawTiff) else None
            if alpha is None and has_alpha(image):
                alpha = len(image.getbands()) - 1
            values = band_values(image)
        return spread(values[..., list(colour_bands(values.shape[2], alpha, reading))])
    except DECODE_ERRORS:
        return None


def _depth_words(number: int, depth: Depth) -> str:
    if isinstance(depth, int):
        what = f"{_range_words(depth)} ({depth} bits) become 0 to 255 (data.depth: {depth})"
    else:
        low, high = (f"{v:g}" for v in depth)
        what = f"{_range_words(depth)} become 0 to 255 (data.depth: [{low}, {high}])"
    return f"{count(number, 'image')} with more than 8 bits: {what}, the same in all of them."


def _range_words(depth: Depth) -> str:
    limits = Reading(depth).limits
    assert limits is not None
    return f"values from {limits[0]:g} to {limits[1]:g}"
