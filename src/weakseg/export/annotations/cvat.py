"""CVAT: the zip archive that "Upload annotations -> Segmentation mask 1.1" takes, and gives.

::

    masks.zip
        labelmap.txt                            name:red,green,blue::
        SegmentationClass/cat/001.png           colour = label
        SegmentationObject/cat/001.png          colour = number of the object in this image
        ImageSets/Segmentation/default.txt      the images by their names in the task
    labels.json                                 for the task's label constructor, tab "Raw"

CVAT makes one mask of each object: one connected area of a class by default, or all of a class
(``objects="class"``). Its object colours count to 254; in an image with more areas, the smallest of
each class are one object together.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from weakseg.data.images import voc_palette
from weakseg.export.annotations.base import (
    Format,
    Found,
    Item,
    Labels,
    MaskSet,
    dropped,
    formats,
    instances,
)
from weakseg.export.annotations.tree import Problems, Tree
from weakseg.export.annotations.voc import label_map, list_line, read_tree

__all__ = ["Cvat"]

_MOST_OBJECTS = 254  # 255 is the colour of VOC's borders


@formats.register("cvat")
class Cvat(Format):
    """See the module's text."""

    def write(self, masks: MaskSet, out: Path) -> list[str]:
        """``masks.zip`` and ``labels.json``."""
        objects = masks.options.objects or "component"
        lines = [list_line(item.id) for item in masks.items]
        colours = np.zeros((256, 3), dtype=np.uint8)
        for label in masks.labels:
            colours[label] = masks.colour(label)

        def work(_: Item, mask: np.ndarray) -> tuple[bytes, bytes]:
            return _png(mask, colours), _png(_numbered(mask, objects), voc_palette())

        with zipfile.ZipFile(out / "masks.zip", "w") as archive:
            _put(archive, "labelmap.txt", _text(label_map(masks, unsure=True)))
            _put(archive, "ImageSets/Segmentation/default.txt", _text(lines))
            for item, (classes, numbers) in masks.each(work, "cvat"):
                _put(archive, f"SegmentationClass/{item.id}.png", classes)
                _put(archive, f"SegmentationObject/{item.id}.png", numbers)
        entries = [
            {"name": name, "color": masks.web_colour(label), "attributes": []}
            for label, name in masks.labels.items()
        ]
        (out / "labels.json").write_text(
            json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return dropped(masks)

    def fits(self, tree: Tree) -> bool:
        """True where there are SegmentationClass and labelmap.txt."""
        return bool(tree.below("SegmentationClass", ".png")) and bool(tree.named("labelmap.txt"))

    def read(self, tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
        """All masks, and what the lists name beyond them."""
        yield from read_tree(tree, labels, problems)


def _numbered(mask: np.ndarray, objects: str) -> np.ndarray:
    """(H, W) uint8: object numbers 1 to 254."""
    numbers, ids = instances(mask, objects)
    if len(ids) <= _MOST_OBJECTS:
        return numbers.astype(np.uint8)
    owners = np.array(ids)
    kinds = np.unique(owners)
    areas = np.bincount(numbers.ravel(), minlength=len(ids) + 1)[1:]
    alone = np.argsort(-areas, kind="stable")[: _MOST_OBJECTS - len(kinds)]
    table = np.zeros(len(ids) + 1, dtype=np.uint8)
    table[1:] = np.searchsorted(kinds, owners) + 1  # what is left over of each class
    table[alone + 1] = len(kinds) + 1 + np.arange(len(alone))
    return table[numbers]


def _png(mask: np.ndarray, colours: np.ndarray) -> bytes:
    image = Image.fromarray(mask)
    image.putpalette(colours.tobytes())
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a member with a fixed date, so that the same masks give the same archive."""
    member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    member.external_attr = 0o644 << 16
    compression = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
    archive.writestr(member, content, compress_type=compression)
