"""YOLO segmentation (Ultralytics): outlines as text, one line for each part.

::

    data.yaml                     names of the classes, folders of the splits
    images/train/cat/001.jpg      links to the images, or copies
    labels/train/cat/001.txt      class x y x y ...; x, y as shares of the width and height

A line is one connected area (over edges, not corners) of a class, outlined along the edges of its
pixels, so that filling it by pixel centres gives the mask back. The format knows no holes: each is
joined to the outline by a bridge, a way there and the same way back. A filler by the even-odd rule
leaves the hole free; one that also draws outlines, as OpenCV's does, covers the bridge and a rim of
up to one pixel. An image without objects has an empty file.

Reading takes ``data.yaml`` (or ``classes.txt``) and all text files below a folder ``labels``; lines
are filled in their order by pixel centres.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from weakseg.data.outlines import fill_polygons
from weakseg.errors import UserError
from weakseg.export.annotations.base import (
    Format,
    Found,
    Item,
    Labels,
    MaskSet,
    MisfitError,
    check_split,
    dropped,
    formats,
    place_image,
)
from weakseg.export.annotations.tree import Problems, Tree
from weakseg.export.annotations.voc import write_text

__all__ = ["YoloSeg", "outline"]

_AGAIN = "export it again as YOLO segmentation, with its data.yaml"


@formats.register("yolo-seg")
class YoloSeg(Format):
    """See the module's text."""

    def write(self, masks: MaskSet, out: Path) -> list[str]:
        """The tree."""

        def work(item: Item, mask: np.ndarray) -> None:
            split = check_split(item.split)
            write_text(out / "labels" / split / f"{item.id}.txt", _lines(mask))
            place_image(item, out / "images" / split / item.file, masks.options.copy)

        for _ in masks.each(work, "yolo-seg"):
            pass
        notes = dropped(masks)
        if masks.options.objects == "class":
            notes.append("YOLO has no objects of several parts: each part has a line of its own.")
        folders = {split: f"images/{split}" for split in masks.splits}
        if "train" not in folders or "val" not in folders:
            first = folders.get("train") or next(iter(folders.values()))
            notes.append(
                f"data.yaml needs train and val; what is not there is {first}: a score on it says "
                "nothing, so name other images before you trust one."
            )
            folders = {"train": first, "val": first} | folders
        names = {label - 1: name for label, name in masks.labels.items()}
        text = yaml.safe_dump({**folders, "names": names}, sort_keys=False, allow_unicode=True)
        write_text(out / "data.yaml", text.splitlines())
        return notes

    def fits(self, tree: Tree) -> bool:
        """True where there are text files below ``labels``, and names."""
        return bool(tree.below("labels", ".txt")) and bool(_names_file(tree))

    def read(self, tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
        """All text files below ``labels``."""
        file = _names_file(tree)
        if file is None:
            raise UserError("there is no data.yaml or classes.txt", where=tree.where, mend=_AGAIN)
        names, splits = _read_names(tree, file)
        for name, text in tree.below("labels", ".txt").items():
            parts = _parts(text, tree.text(text), names, labels, problems)
            first, _, inner = name.partition("/")
            tried = [name, inner] if inner else [name]
            if inner and first in splits:
                tried = [inner, name]
            yield Found(tried[0], _Parts(parts), not parts, tuple(tried[1:]))


# --- writing --------------------------------------------------------------------------------


def _lines(mask: np.ndarray) -> list[str]:
    height, width = mask.shape
    lines = []
    for label in np.unique(mask[mask > 0]).tolist():
        count, parts = cv2.connectedComponents((mask == label).astype(np.uint8), connectivity=4)
        places = _places(parts, count)
        for number in range(1, count):
            y, x, bottom, right = places[number]
            points = outline(parts[y:bottom, x:right] == number) + (x, y)
            shares = points / (width, height)
            lines.append(f"{label - 1} " + " ".join(f"{v:.7g}" for v in shares.ravel().tolist()))
    return lines


def _places(parts: np.ndarray, count: int) -> np.ndarray:
    """(count, 4): top, left, bottom and right of each number in (H, W)."""
    y, x = np.nonzero(parts)
    number = parts[y, x]
    places = np.zeros((count, 4), dtype=np.int64)
    places[:, :2] = max(parts.shape)
    for column, values in ((0, y), (1, x)):
        np.minimum.at(places[:, column], number, values)
        np.maximum.at(places[:, column + 2], number, values + 1)
    return places


def outline(own: np.ndarray) -> np.ndarray:
    """(N, 2) corners x, y of the one polygon around an area, its holes joined by bridges.

    Args:
        own: (H, W) bool, one area that is connected over edges.
    """
    outer, *holes = _loops(own)
    for hole in sorted(holes, key=lambda h: h[:, 0].min()):
        gaps = np.abs(outer[:, None] - hole[None]).sum(-1)
        i, j = np.unravel_index(gaps.argmin(), gaps.shape)
        around = np.concatenate([hole[j:], hole[: j + 1]])
        outer = np.concatenate([outer[: i + 1], around, outer[i:]])
    return outer


def _loops(own: np.ndarray) -> list[np.ndarray]:
    """Closed paths along the edges of the pixels, (N, 2) corners each, the outer one first.

    Along a grid line, the corners of an outline pair up: first with second, third with fourth. Where
    two pixels touch at a corner only, it belongs to two loops, or twice to one.
    """
    grid = np.pad(own, 1)
    a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:]
    twice = (a == d) & (b == c) & (a != b)
    y, x = np.nonzero((a ^ b ^ c ^ d) | twice)
    repeated = twice[y, x]
    falling = a[y, x] & repeated  # the pixels are upper left and lower right
    y, x = np.append(y, y[repeated]), np.append(x, x[repeated])
    copy = np.repeat([0, 1], [len(repeated), int(repeated.sum())])
    other = np.append(falling, falling[repeated]) == (copy == 1)  # keeps apart what only touches
    along, down = np.empty(len(y), dtype=np.int64), np.empty(len(y), dtype=np.int64)
    for order, partner in ((np.lexsort((copy, x, y)), along), (np.lexsort((other, y, x)), down)):
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    steps, points = (along.tolist(), down.tolist()), np.stack([x, y], axis=1)
    free, loops = [True] * len(y), []
    for start in np.lexsort((copy, x, y)).tolist():  # the uppermost corner lies on the outer loop
        loop, at, turn = [], start, 0
        while free[at]:
            free[at] = False
            loop.append(at)
            at = steps[turn][at]
            turn = 1 - turn
        if loop:
            loops.append(points[loop])
    return loops


# --- reading --------------------------------------------------------------------------------


def _names_file(tree: Tree) -> str | None:
    return tree.named("data.yaml") or tree.named("data.yml") or tree.named("classes.txt")


def _read_names(tree: Tree, file: str) -> tuple[dict[int, str], set[str]]:
    """Class number -> name, and the names of the splits."""
    text = tree.text(file)
    if file.endswith(".txt"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return dict(enumerate(lines)), set()
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(
            f"{file} is no readable YAML ({str(error).splitlines()[0]})",
            where=tree.where,
            mend=_AGAIN,
        ) from None
    names: Any = value.get("names") if isinstance(value, dict) else None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    plain = isinstance(names, dict) and all(
        type(k) is int and isinstance(v, str | int | float) for k, v in names.items()
    )
    if not plain:
        raise UserError(f"{file} names no classes", where=tree.where, mend=_AGAIN)
    return {k: str(v) for k, v in names.items()}, {str(key) for key in value}


def _parts(
    file: str, text: str, names: dict[int, str], labels: Labels, problems: Problems
) -> list[tuple[int, np.ndarray]]:
    """(id, (N, 2) shares) of each line."""
    parts = []
    for number, line in enumerate(text.splitlines(), start=1):
        words, where = line.split(), f"{file}, line {number}"
        if not words:
            continue
        try:
            kind, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            problems.add("lines that are not numbers", where, _AGAIN)
            continue
        if len(values) < 6 or len(values) % 2 or not all(map(math.isfinite, values)):
            problems.add("lines that are no outlines (boxes have four numbers)", where, _AGAIN)
        elif kind not in names:
            problems.add("class numbers without a name", f"{where}: {kind}", _AGAIN)
        else:
            label = labels.need(names[kind], problems)
            if label is not None:
                parts.append((label, np.array(values).reshape(-1, 2)))
    return parts


class _Parts:
    """Fills the parts of one image."""

    def __init__(self, parts: list[tuple[int, np.ndarray]]) -> None:
        self.parts = parts

    def __call__(self, size: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(size, dtype=np.uint8)
        for label, shares in self.parts:
            if shares.min() < -0.01 or shares.max() > 1.01:
                raise MisfitError("outlines are in pixels, not in shares of the image's size")
            points = shares * (size[1], size[0])
            mask[fill_polygons([points.ravel().tolist()], size)] = label
        return mask
