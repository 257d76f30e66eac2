"""COCO's instances file: everything but the outlines, read element by element.

The outlines are nearly all of such a file. They are found in its text where they are needed, so that
a file of hundreds of megabytes takes little more memory than its text.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from weakseg.data.sources import tidy
from weakseg.errors import UserError

__all__ = ["FORMAT", "Faults", "InstancesFile", "read_instances"]

FORMAT = "give an instances file: an object with the lists images, annotations and categories"
"""The mend of a file that is something else."""

_AGAIN = "download or export the file again"
_SHOWN = 6


@dataclass
class Faults:
    """Collects what is wrong with a file, to report all of it at once."""

    where: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, item: object) -> None:
        """Notes that ``item`` is ``what``."""
        self.found.setdefault(what, []).append(f"{item!r:.60}")

    def check(self, mend: str = _AGAIN) -> None:
        """Raises one UserError with everything that was added."""
        if not self.found:
            return
        lines = ["the file cannot be used:"]
        for what, items in islice(self.found.items(), _SHOWN):
            lines.append(f"    {len(items):,} × {what}, such as {', '.join(items[:3])}")
        if len(self.found) > _SHOWN:
            lines.append(f"    and {len(self.found) - _SHOWN} other problems")
        raise UserError("\n".join(lines), where=self.where, mend=mend)


@dataclass
class InstancesFile:
    """One instances file, less the outlines: of each, only its place in the text is kept.

    The outlines are nearly all of such a file, and as Python lists they would need eight times the
    file's size.

    Attributes:
        path: The file.
        text: All of it.
        images: Image id -> ``file_name``, ``height`` and ``width``.
        categories: Category id -> name.
        image: Of each annotation, the id of its image.
        category: Of each annotation, the id of its category.
        crowd: Of each annotation, 1 for a crowd.
        box: Four numbers for each annotation, one after the other: x, y, width, height.
        place: Of each annotation, where it starts in the text.
    """

    path: Path
    text: str
    images: dict[Any, dict[str, Any]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    image: list[Any] = field(default_factory=list)
    category: array[int] = field(default_factory=lambda: array("q"))
    crowd: bytearray = field(default_factory=bytearray)
    box: array[float] = field(default_factory=lambda: array("d"))
    place: array[int] = field(default_factory=lambda: array("q"))

    def outline(self, index: int) -> Any:
        """The segmentation of an annotation as the file spells it; None where it has none."""
        return _DECODER.raw_decode(self.text, self.place[index])[0].get("segmentation")


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
# An object without objects in it and without escapes, and its polygons: nine tenths of the numbers
# of a file, which need not be read to know the tags.
_FLAT = re.compile(r'\{[^{}"]*+(?:"[^{}"\\]*+"[^{}"]*+)*+\}')
_POLYGONS = re.compile(r'"segmentation"\s*:\s*\[[-+0-9.eE,\s\[\]]*\]')


def read_instances(path: Path) -> InstancesFile:
    """Reads an instances file.

    Raises:
        UserError: It is no JSON, no instances file, or entries of it cannot be used (all are named).
    """
    try:
        text = _text(path)
        table = InstancesFile(path, text.removeprefix("\ufeff"))
        faults = Faults(path)
        _walk(table, faults)
    except (ValueError, RecursionError, MemoryError) as error:
        detail = str(error) or type(error).__name__
        raise UserError(f"this is not readable JSON ({detail})", where=path, mend=_AGAIN) from None
    faults.check()
    if not table.images or not table.categories:
        missing = "images" if not table.images else "categories"
        raise UserError(f"the file lists no {missing}", where=path, mend=FORMAT)
    return table


def _text(path: Path) -> str:
    """The file's text; mapped while it is read, so that it takes memory once."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return ""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return str(content, "utf-8")


def _walk(table: InstancesFile, faults: Faults) -> None:
    """Reads the outer object element by element."""
    text = table.text
    readers: dict[str, Callable[[InstancesFile, Faults, Any, int], None]] = {
        "images": _take_image,
        "annotations": _take_annotation,
        "categories": _take_category,
    }
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        listed = text[at : at + 1] == "["
        raise UserError(
            f"the file holds {'a list' if listed else 'no JSON object'}",
            where=table.path,
            mend=FORMAT + (" (a list may be COCO results)" if listed else ""),
        )
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError(f"a key expected before character {at:,}")
        at = _skip(text, _expect(text, at, ":"))
        take = readers.get(key)
        if take is not None and text[at : at + 1] == "[":
            at = _each(text, at, partial(take, table, faults))
        else:
            _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != "}":
            at = _skip(text, _expect(text, at, ","))


def _each(text: str, at: int, take: Callable[[Any, int], None]) -> int:
    """Hands each element of the array at ``at`` over, with its place; returns the array's end."""
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        element, end = _element(text, at)
        take(element, at)
        at = _skip(text, end)
        if text[at : at + 1] != "]":
            at = _skip(text, _expect(text, at, ","))
    return at + 1


def _element(text: str, at: int) -> tuple[Any, int]:
    """The element at ``at``, its polygons left out where that is simple, and its end."""
    flat = _FLAT.match(text, at)
    if flat is not None:
        with contextlib.suppress(ValueError):
            return json.loads(_POLYGONS.sub('"segmentation":0', flat[0], count=1)), flat.end()
    return _DECODER.raw_decode(text, at)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, mark: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != mark:
        raise ValueError(f"'{mark}' expected at character {at:,}")
    return at + 1


def _take_image(table: InstancesFile, faults: Faults, entry: Any, _: int) -> None:
    if not isinstance(entry, dict) or not _is_key(entry.get("id")):
        faults.add("image without an id", entry)
    elif not isinstance(entry.get("file_name"), str) or not entry["file_name"].strip():
        faults.add("image without a file_name", entry["id"])
    elif entry["id"] in table.images:
        faults.add("image id that stands twice", entry["id"])
    else:
        kept = ("file_name", "height", "width")
        table.images[entry["id"]] = {key: entry.get(key) for key in kept}


def _take_category(table: InstancesFile, faults: Faults, entry: Any, _: int) -> None:
    key, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
    if type(key) is not int or abs(key) >= 2**63:
        faults.add("category whose id is no whole number", entry)
    elif not isinstance(name, str) or not tidy(name):
        faults.add("category without a name", key)
    elif key in table.categories or tidy(name) in table.categories.values():
        faults.add("category id or name that stands twice", f"{key}: {name}")
    else:
        table.categories[key] = tidy(name)


def _take_annotation(table: InstancesFile, faults: Faults, entry: Any, start: int) -> None:
    if not isinstance(entry, dict) or not _is_key(entry.get("image_id")):
        faults.add("annotation without an image_id", entry)
        return
    shown = entry.get("id", len(table.image))
    category = entry.get("category_id")
    box = entry.get("bbox") or [0, 0, 0, 0]
    if type(category) is not int or abs(category) >= 2**63:
        faults.add("annotation whose category_id is no whole number", shown)
    elif entry.get("iscrowd") not in (0, 1, None):
        faults.add("annotation whose iscrowd is neither 0 nor 1", shown)
    elif not _is_box(box):
        faults.add("annotation whose bbox is not four numbers", shown)
    else:
        table.image.append(entry["image_id"])
        table.category.append(category)
        table.crowd.append(bool(entry.get("iscrowd")))
        table.box.extend(box)
        table.place.append(start)


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(type(n) in (int, float) and abs(n) < 1e9 for n in value)
