"""Small pictures as data URIs: image, heat map of the scores, masks and overlays.

Class names are never drawn into pixels; the page shows them as chips beside the pictures.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from weakseg.data.images import read_mask, voc_palette
from weakseg.data.samples import Sample, lot
from weakseg.data.scorefile import read_scores
from weakseg.errors import UserError

__all__ = [
    "HEAT_STOPS",
    "Picture",
    "chip_colour",
    "chip_colours",
    "choose",
    "heat_map",
    "mask_picture",
    "overlay",
    "photo",
    "thumbnail",
    "truth_picture",
]

SIDE = 220
"""Longest side of a picture in pixels."""

LIMIT = 25_000
"""Largest picture in bytes, before base64."""

UNSURE = 255

_MAP = cv2.COLORMAP_INFERNO


@dataclass(frozen=True)
class Picture:
    """One picture, ready for ``<img>``."""

    uri: str
    width: int
    height: int


# --- which images ---------------------------------------------------------------------------


def choose(samples: Iterable[Sample], classes: Sequence[str], count: int) -> list[Sample]:
    """Samples that together show as many classes as possible, and classes evenly.

    The choice depends on ids and tags alone: the same collection gives the same pictures. It is
    arbitrary within a class, so that a report shows neither the best nor the worst results.

    Args:
        samples: Where to choose from; images without a tag are left out.
        classes: All class names.
        count: How many, at most.
    """
    unused = {s.id: s for s in sorted(samples, key=lambda s: lot(s.id)) if s.tags}
    shown: Counter[str] = Counter()
    chosen: list[Sample] = []
    while unused and len(chosen) < count:
        rarest = _least_shown(unused.values(), classes, shown)
        fitting = [s for s in unused.values() if rarest in (s.tags or ())]
        # One or two classes that were not shown yet; crowded scenes teach the eye little.
        sample = max(fitting, key=lambda s: _worth(s, shown))
        chosen.append(unused.pop(sample.id))
        shown.update(set(sample.tags or ()))
    return chosen


def _least_shown(samples: Iterable[Sample], classes: Sequence[str], shown: Counter[str]) -> str:
    present = {tag for s in samples for tag in s.tags or ()}
    order = {name: i for i, name in enumerate(classes)}
    return min(present, key=lambda tag: (shown[tag], order.get(tag, len(order)), tag))


def _worth(sample: Sample, shown: Counter[str]) -> tuple[int, int]:
    tags = set(sample.tags or ())
    return min(2, sum(not shown[tag] for tag in tags)), -len(tags)


# --- pictures -------------------------------------------------------------------------------


def thumbnail(sample: Sample) -> np.ndarray | None:
    """(h, w, 3) uint8 RGB; ``None`` where the image cannot be read."""
    try:
        return sample.pixels(SIDE)
    except UserError:
        return None


def photo(rgb: np.ndarray) -> Picture:
    """The image itself."""
    return _encoded(Image.fromarray(rgb))


def heat_map(rgb: np.ndarray, path: Path, threshold: float | None = None) -> Picture | None:
    """The best foreground score over a dimmed image, with a line where foreground begins.

    Where the method gives a background map, foreground begins above that, else above the threshold.
    """
    found = best_score(path, (rgb.shape[0], rgb.shape[1]))
    if found is None:
        return None
    best, background = found
    limit = threshold if background is None else background
    colours = cv2.applyColorMap(np.rint(best * 255).astype(np.uint8), _MAP)[..., ::-1]
    gray = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    heat = np.ascontiguousarray(cv2.addWeighted(colours, 0.8, gray, 0.25, 0))
    if limit is not None:
        _outline(heat, best > limit, (255, 255, 255))
    return _encoded(Image.fromarray(heat))


def best_score(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None] | None:
    """(h, w) best foreground score and background map of a score file.

    ``None`` where there is no file, and for the background where there is no such map.
    """
    if not os.path.isfile(path):
        return None
    try:
        scores = read_scores(path)
    except (UserError, EOFError):
        return None
    _, maps = scores.foreground()
    best = maps.max(axis=0) if len(maps) else np.zeros(size, np.float32)
    background = scores.background()
    return _resized(best, size), None if background is None else _resized(background, size)


def _resized(score: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = cv2.resize(score, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return np.clip(np.nan_to_num(resized), 0, 1)


def small_mask(path: Path | None, size: tuple[int, int]) -> np.ndarray | None:
    """(h, w) uint8 ids of a mask file at this size; ``None`` where it cannot be read."""
    if path is None or not os.path.isfile(path):
        return None
    try:
        return _at(read_mask(path), size)
    except UserError:
        return None


def _at(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)


def mask_picture(path: Path | None, size: tuple[int, int]) -> Picture | None:
    """A mask in VOC colours."""
    mask = small_mask(path, size)
    return None if mask is None else _coloured(mask)


def truth_picture(sample: Sample, size: tuple[int, int]) -> Picture | None:
    """The ground truth of an image in VOC colours, where it has one that can be read."""
    if sample.mask is None:
        return None
    try:
        return _coloured(_at(sample.truth(), size))
    except UserError:
        return None


def _coloured(mask: np.ndarray) -> Picture:
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette().tobytes())
    return _encoded(picture)


def overlay(rgb: np.ndarray, path: Path | None) -> Picture | None:
    """The mask's colours over the image, each object with a contour; unsure places are pale."""
    mask = small_mask(path, (rgb.shape[0], rgb.shape[1]))
    if mask is None:
        return None
    colours = voc_palette()[mask].astype(np.float32)
    strength = np.where(mask == 0, 0.0, 0.5)[..., None].astype(np.float32)
    # A slightly darker ground lets the objects step forward.
    ground = rgb * np.where(mask == 0, 0.72, 1.0)[..., None].astype(np.float32)
    mixed = np.rint(ground * (1 - strength) + colours * strength).astype(np.uint8)
    for label in np.unique(mask):
        if label not in (0, UNSURE):
            _outline(mixed, mask == label, (255, 255, 255))
    return _encoded(Image.fromarray(mixed))


def chip_colour(class_id: int) -> str:
    """Colour of a class in masks, for a style sheet."""
    red, green, blue = voc_palette()[class_id % 256]
    return f"#{red:02x}{green:02x}{blue:02x}"


def chip_colours(classes: Sequence[str]) -> dict[str, str]:
    """Colour of each class and of the background by name, for a style sheet."""
    names = enumerate(("background", *classes))
    return {name: chip_colour(i) for i, name in names}


def _heat_stops() -> str:
    ramp = cv2.applyColorMap(np.linspace(0, 255, 9).astype(np.uint8)[None], _MAP)[0, :, ::-1]
    return ", ".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in ramp)


HEAT_STOPS = _heat_stops()
"""The heat map's colours from 0 to 1, for a CSS gradient."""


def _outline(picture: np.ndarray, region: np.ndarray, colour: tuple[int, int, int]) -> None:
    found, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, found, -1, colour, 1)


def _encoded(picture: Image.Image) -> Picture:
    """JPEG for photographs, PNG for masks, never above the limit."""
    while True:
        for quality in (85, 72, 58, 42):
            data, kind = _compressed(picture, quality)
            if len(data) <= LIMIT:
                uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
                return Picture(uri, *picture.size)
        half = (max(1, picture.width // 2), max(1, picture.height // 2))
        picture = picture.resize(half, Image.Resampling.NEAREST)


def _compressed(picture: Image.Image, quality: int) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    if picture.mode == "P":
        picture.save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), "png"
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue(), "jpeg"
