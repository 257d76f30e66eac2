"""COCO: instances JSON with run lengths, which hold holes and parts exactly.

::

    annotations/instances_<split>.json     one file for each split
    images/cat/001.jpg                     links to the images, or copies

Category ids are the ids in masks (1 to K). An annotation is one connected area of a class by
default, so that a false one can be deleted with a click; ``objects="class"`` makes one of all pixels
of a class. Areas of one class that touch are one object, because a mask does not tell them apart.
``iscrowd`` is always 0: unsure pixels are no crowd, which in COCO is a group of objects of a known
class and which most tools drop.

Reading takes polygons and run lengths of any tool and draws them in the order of the file, later
ones on top; a crowd is drawn like an object.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.data.outlines import fill_polygons, read_runs
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
    expect_size,
    formats,
    instances,
    place_image,
)
from weakseg.export.annotations.tree import Problems, Tree
from weakseg.files import atomic_path

__all__ = ["Coco", "compress_runs"]

_AGAIN = "export it again as COCO instances (images, annotations, categories)"


@formats.register("coco")
class Coco(Format):
    """See the module's text."""

    def write(self, masks: MaskSet, out: Path) -> list[str]:
        """``annotations`` and ``images``."""
        objects = masks.options.objects or "component"
        categories = [
            {"id": label, "name": name, "supercategory": ""} for label, name in masks.labels.items()
        ]
        files: dict[str, dict[str, Any]] = {
            check_split(split): {
                "info": {"description": "masks made by weakseg"},
                "licenses": [],
                "images": [],
                "annotations": [],
                "categories": categories,
            }
            for split in masks.splits
        }

        def work(item: Item, mask: np.ndarray) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
            place_image(item, out / "images" / item.file, masks.options.copy)
            return mask.shape, _objects(mask, objects)

        for item, ((height, width), found) in masks.each(work, "coco"):
            file = files[item.split]
            image = {"id": len(file["images"]) + 1, "file_name": item.file}
            file["images"].append(image | {"width": width, "height": height})
            for entry in found:
                number = {"id": len(file["annotations"]) + 1, "image_id": image["id"]}
                file["annotations"].append(number | entry)
        for split, file in files.items():
            with atomic_path(out / "annotations" / f"instances_{split}.json") as temporary:
                text = json.dumps(file, ensure_ascii=False, separators=(",", ":"))
                temporary.write_text(text + "\n", encoding="utf-8")
        return dropped(masks)

    def fits(self, tree: Tree) -> bool:
        """True where a JSON file holds images, annotations and categories."""
        return any(_is_instances(tree.json(name)) for name in tree.ending(".json"))

    def read(self, tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
        """All images of all instances files."""
        files = [
            (name, value)
            for name in tree.ending(".json")
            if _is_instances(value := tree.json(name))
        ]
        if not files:
            raise UserError("there is no instances file", where=tree.where, mend=_AGAIN)
        for name, value in files:
            yield from _read(name, value, labels, problems)


def _is_instances(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), list) for key in ("images", "annotations", "categories")
    )


# --- writing --------------------------------------------------------------------------------


def _objects(mask: np.ndarray, objects: str) -> list[dict[str, Any]]:
    """Annotations of one mask, without their numbers.

    All objects' runs are found in one pass down the columns.
    """
    numbers, ids = instances(mask, objects)
    height, width = mask.shape
    flat = numbers.ravel(order="F")
    start = np.flatnonzero(np.diff(flat, prepend=-1))
    length = np.diff(start, append=flat.size)
    owner = flat[start]
    order = np.argsort(owner, kind="stable")
    edges = np.searchsorted(owner[order], np.arange(1, len(ids) + 2))
    found = []
    for number, label in enumerate(ids):
        own = order[edges[number] : edges[number + 1]]
        first, last = start[own], start[own] + length[own] - 1
        counts = np.empty(2 * len(own) + 1, dtype=np.int64)
        counts[:-1:2] = first - np.append(0, last[:-1] + 1)
        counts[1::2] = length[own]
        counts[-1] = flat.size - last[-1] - 1
        runs = counts.tolist()
        wraps = bool((first // height != last // height).any())
        x, y = int(first[0] // height), 0 if wraps else int((first % height).min())
        right, bottom = int(last[-1] // height), height - 1 if wraps else int((last % height).max())
        found.append(
            {
                "category_id": label,
                "iscrowd": 0,
                "segmentation": {
                    "size": [height, width],
                    "counts": compress_runs(runs if runs[-1] else runs[:-1]),
                },
                "area": int(length[own].sum()),
                "bbox": [x, y, right - x + 1, bottom - y + 1],
            }
        )
    return found


def compress_runs(runs: list[int]) -> str:
    """Run lengths as COCO's text: five bits in each character, the lowest first.

    Bit 6 of a character says that more follow, the sign is bit 5 of the last; from the fourth run
    on, the difference to the run before the last is stored.
    """
    text = bytearray()
    for i, run in enumerate(runs):
        number = run - runs[i - 2] if i > 2 else run
        while True:
            bits = number & 31
            number >>= 5  # keeps the sign
            done = number == (-1 if bits & 16 else 0)
            text.append(48 + (bits if done else bits | 32))
            if done:
                break
    return text.decode("ascii")


# --- reading --------------------------------------------------------------------------------


def _read(file: str, value: dict[str, Any], labels: Labels, problems: Problems) -> Iterator[Found]:
    ids: dict[Any, int | None] = {}
    for category in value["categories"]:
        if not isinstance(category, dict) or not _is_key(category.get("id")):
            problems.add("categories without an id", f"{file}: {category!r:.60}", _AGAIN)
        else:
            ids[category["id"]] = labels.find(str(category.get("name", "")))
    names = {
        c["id"]: str(c.get("name", ""))
        for c in value["categories"]
        if isinstance(c, dict) and "id" in c and _is_key(c["id"])
    }
    drawn: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
    for number, annotation in enumerate(value["annotations"]):
        shown = f"{file}: annotation {number + 1}"
        if not isinstance(annotation, dict) or not _is_key(annotation.get("image_id")):
            problems.add("annotations without an image_id", shown, _AGAIN)
        elif not _is_key(annotation.get("category_id")) or annotation["category_id"] not in ids:
            problems.add("annotations of a category that is not listed", shown, _AGAIN)
        elif ids[annotation["category_id"]] is None:
            labels.need(names[annotation["category_id"]], problems)
        else:
            label = ids[annotation["category_id"]]
            drawn[annotation["image_id"]].append((label or 0, annotation.get("segmentation")))
    seen = set()
    for image in value["images"]:
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(image, dict) or not _is_key(image.get("id")) or not isinstance(name, str):
            problems.add("images without an id or a file_name", f"{file}: {image!r:.60}", _AGAIN)
            continue
        seen.add(image["id"])
        yield Found(name, _Drawing(image, drawn[image["id"]]), empty=not drawn[image["id"]])
    for key in drawn.keys() - seen:
        problems.add("annotations of an image that is not listed", f"{file}: image {key!r}", _AGAIN)


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


class _Drawing:
    """Draws the objects of one image."""

    def __init__(self, image: dict[str, Any], objects: list[tuple[int, Any]]) -> None:
        self.size, self.objects = (image.get("height"), image.get("width")), objects

    def __call__(self, size: tuple[int, int]) -> np.ndarray:
        expect_size(self.size, size)
        mask = np.zeros(size, dtype=np.uint8)
        for label, outline in self.objects:
            try:
                inside = (
                    fill_polygons(outline, size)
                    if isinstance(outline, list)
                    else read_runs(outline, size)
                )
            except ValueError as error:
                raise MisfitError(str(error)) from None
            mask[inside] = label
        return mask
