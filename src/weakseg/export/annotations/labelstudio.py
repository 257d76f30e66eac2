"""Label Studio: masks as predictions that a person takes over and corrects with the brush.

::

    tasks.json     import it into the project; each task has one prediction
    config.xml     paste it under Settings -> Labeling Interface -> Code

One brush region holds all pixels of a class in an image (``objects="component"`` makes one of each
connected area). The images themselves are not in the file: a task names a URL, by default one of
Label Studio's local files, ``/data/local-files/?d=<folder of the images>/<path>``, for which
``LOCAL_FILES_DOCUMENT_ROOT`` is the folder that holds the folder of the images; ``image_url`` puts
something else before the path, such as ``https://host/images/``.

A brush region is a bitmap of four channels (only the last, alpha, counts) in the bit format of
thi.ng's *rle-pack*, https://docs.thi.ng/umbrella/rle-pack/::

    32 bits   number of values
     5 bits   bits of a value, less 1
    16 bits   four times 4 bits: bits of the four kinds of counters, less 1
    then      1 bit: 1 = one value repeated, 0 = literal values
              2 bits: kind of the counter; the counter, less 1; the value, or all values

Reading takes the JSON export (not JSON-MIN): of each task the annotation marked as ground truth, or
else the one that was saved last, cancelled ones left out. Brush and polygon regions are drawn in
their order, later ones on top. A task without an annotation was not corrected and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np

from weakseg.data.outlines import fill_polygons
from weakseg.errors import UserError
from weakseg.export.annotations.base import (
    Format,
    Found,
    Item,
    Labels,
    MaskSet,
    MisfitError,
    dropped,
    expect_size,
    formats,
    instances,
)
from weakseg.export.annotations.tree import Problems, Tree
from weakseg.files import atomic_path

__all__ = ["LabelStudio", "brush", "unbrush"]

_SIZES = (3, 4, 8, 16)  # bits of the counters that are written
_UPLOAD = re.compile(r"[0-9a-f]{8}-")  # what Label Studio puts before an uploaded file's name
_OF_IMAGE = ("choices", "textarea", "rating")  # kinds of regions that hold no pixels
_AGAIN = "export the project again as JSON (not JSON-MIN)"


@formats.register("labelstudio")
class LabelStudio(Format):
    """See the module's text."""

    def write(self, masks: MaskSet, out: Path) -> list[str]:
        """``tasks.json`` and ``config.xml``."""
        objects = masks.options.objects or "class"
        names = masks.labels
        before = masks.options.image_url
        notes = []
        if before is None:
            root = _root(masks.items[0])
            before = f"/data/local-files/?d={quote(root.name)}/"
            notes.append(
                f"Images are local files: start Label Studio with LOCAL_FILES_SERVING_ENABLED=true "
                f"and LOCAL_FILES_DOCUMENT_ROOT={root.parent}, and add {root} as local storage."
            )

        def work(item: Item, mask: np.ndarray) -> str:
            numbers, ids = instances(mask, objects)
            regions = [_region(numbers == i, names[k], i) for i, k in enumerate(ids, start=1)]
            prediction: dict[str, Any] = {"model_version": "weakseg", "result": regions}
            if item.score is not None:
                prediction["score"] = item.score
            data = {"image": before + quote(item.file), "weakseg_id": item.id}
            return json.dumps({"data": data, "predictions": [prediction]}, separators=(",", ":"))

        # Bytes as JSON numbers are bulky: one task after the other, each in a line.
        with atomic_path(out / "tasks.json") as temporary, temporary.open("w") as file:
            file.write("[\n")
            for number, (_, task) in enumerate(masks.each(work, "labelstudio")):
                file.write((",\n" if number else "") + task)
            file.write("\n]\n")
        with atomic_path(out / "config.xml") as temporary:
            temporary.write_text(_configuration(masks), encoding="utf-8")
        return notes + dropped(masks)

    def fits(self, tree: Tree) -> bool:
        """True where a JSON file holds a list of tasks."""
        return any(_is_tasks(tree.json(name)) for name in tree.ending(".json"))

    def read(self, tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
        """The annotated tasks of all JSON files."""
        files = [(n, v) for n in tree.ending(".json") if _is_tasks(v := tree.json(n))]
        if not files:
            raise UserError("there is no list of tasks", where=tree.where, mend=_AGAIN)
        for file, tasks in files:
            for number, task in enumerate(tasks, start=1):
                yield from _read(f"{file}: task {number}", task, labels, problems)


def _is_tasks(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, dict) and isinstance(v.get("data"), dict) for v in value)
    )


# --- writing --------------------------------------------------------------------------------


def _root(item: Item) -> Path:
    """The folder that the image's path is relative to."""
    return Path(str(item.image.absolute())[: -len(item.file)])


def _configuration(masks: MaskSet) -> str:
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image", zoom="true")
    brushes = ElementTree.SubElement(view, "BrushLabels", name="label", toName="image")
    for label, name in masks.labels.items():
        ElementTree.SubElement(brushes, "Label", value=name, background=masks.web_colour(label))
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _region(own: np.ndarray, name: str, number: int) -> dict[str, Any]:
    height, width = own.shape
    return {
        "id": f"weakseg{number}",
        "type": "brushlabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": brush(own), "brushlabels": [name]},
    }


def brush(own: np.ndarray) -> list[int]:
    """The bytes of a brush region.

    Args:
        own: (H, W) bool.
    """
    flat = own.ravel()
    start = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=-1))
    length = 4 * np.diff(start, append=flat.size)
    bits = [f"{4 * flat.size:032b}{7:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    for value, left in zip(flat[start].tolist(), length.tolist(), strict=True):
        word = "11111111" if value else "00000000"
        while left:
            kind = next((k for k, size in enumerate(_SIZES) if left <= 1 << size), len(_SIZES) - 1)
            run = min(left, 1 << _SIZES[kind])
            bits.append(f"1{kind:02b}{run - 1:0{_SIZES[kind]}b}{word}")
            left -= run
    text = np.frombuffer("".join(bits).encode("ascii"), dtype=np.uint8) - ord("0")
    packed: list[int] = np.packbits(text).tolist()
    return packed


# --- reading --------------------------------------------------------------------------------


def unbrush(code: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a brush region: where its alpha channel is above one half.

    Raises:
        ValueError: The bytes are damaged, or of another size.
    """
    whole = isinstance(code, list) and all(type(n) is int and 0 <= n < 256 for n in code)
    if not whole or len(code) < 7:
        raise ValueError("a brush region is no list of bytes")
    bits = np.unpackbits(np.array(code, dtype=np.uint8))
    text = (bits + ord("0")).tobytes().decode("ascii")
    total, word = int(text[:32], 2), int(text[32:37], 2) + 1
    sizes = [int(text[37 + 4 * k : 41 + 4 * k], 2) + 1 for k in range(4)]
    if total != 4 * size[0] * size[1]:
        raise ValueError(f"a brush region of {total:,} values for {size[1]} x {size[0]} pixels")
    if word != 8:
        raise ValueError(f"a brush region with values of {word} bits")
    values = np.empty(total, dtype=np.uint8)
    at, done = 53, 0
    while done < total:
        counter = at + 3 + sizes[int(text[at + 1 : at + 3] or "0", 2)]
        number = int(text[at + 3 : counter] or "0", 2) + 1
        end = counter + (word if text[at : at + 1] == "1" else word * number)
        if end > len(text) or done + number > total:
            raise ValueError("the bytes of a brush region end too early, or are too many")
        values[done : done + number] = np.packbits(bits[counter:end])
        at, done = end, done + number
    return values.reshape(*size, 4)[..., 3] > 127


def _read(where: str, task: dict[str, Any], labels: Labels, problems: Problems) -> Iterator[Found]:
    annotation = _chosen(task.get("annotations"))
    if annotation is None:
        return
    names = _names(task["data"])
    if not names:
        problems.add("tasks without an image", where, "import tasks that name it as 'image'")
        return
    regions: list[tuple[int, dict[str, Any]]] = []
    for region in annotation["result"]:
        kind = region.get("type") if isinstance(region, dict) else None
        if kind not in ("brushlabels", "polygonlabels"):
            if kind in _OF_IMAGE and isinstance(region.get("value"), dict):
                continue  # of the image as a whole
            problems.add(
                "regions that are neither brush nor polygon",
                f"{where}: {kind!r:.60}",
                "redraw them",
            )
            continue
        value = region.get("value")
        label = value.get(kind) if isinstance(value, dict) else None
        if not isinstance(label, list) or len(label) != 1 or not isinstance(label[0], str):
            problems.add("regions without one label", where, "give each region one label")
            continue
        found = labels.need(label[0], problems)
        if found is not None:
            regions.append((found, region))
    yield Found(names[0], _Regions(regions), other_names=tuple(names[1:]))


def _chosen(annotations: Any) -> dict[str, Any] | None:
    """The annotation of a task that counts."""
    given = [
        a
        for a in (annotations if isinstance(annotations, list) else [])
        if isinstance(a, dict) and isinstance(a.get("result"), list) and not a.get("was_cancelled")
    ]
    preferred = [a for a in given if a.get("ground_truth")] or given
    return max(preferred, key=lambda a: str(a.get("updated_at", "")), default=None)


def _names(data: dict[str, Any]) -> list[str]:
    """What a task's image may be called in the run, the surest first."""
    names = []
    if isinstance(data.get("weakseg_id"), str):
        names.append(data["weakseg_id"])
    url = data.get("image")
    if not isinstance(url, str) or not url:
        return names
    parts = urlsplit(url)
    local = parse_qs(parts.query).get("d")
    path = local[0] if local else unquote(parts.path)
    pieces = [piece for piece in path.split("/") if piece]
    # Longer tails first: the image's path is the end of the URL's.
    names += ["/".join(pieces[i:]) for i in range(len(pieces))]
    if pieces and _UPLOAD.match(pieces[-1]):
        names.append(_UPLOAD.sub("", pieces[-1], count=1))
    return names


class _Regions:
    """Draws the regions of one image."""

    def __init__(self, regions: list[tuple[int, dict[str, Any]]]) -> None:
        self.regions = regions

    def __call__(self, size: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(size, dtype=np.uint8)
        for label, region in self.regions:
            expect_size((region.get("original_height"), region.get("original_width")), size)
            if region.get("image_rotation") not in (None, 0):
                raise MisfitError("the image was rotated in Label Studio")
            try:
                mask[_inside(region["value"], size)] = label
            except ValueError as error:
                raise MisfitError(str(error)) from None
        return mask


def _inside(value: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    if "points" not in value:
        return unbrush(value.get("rle"), size)
    try:
        points = np.asarray(value["points"], dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        raise ValueError("a polygon is no list of points") from None
    pixels = points * (size[1] / 100, size[0] / 100)  # they are stored in percent
    return fill_polygons([pixels.ravel().tolist()], size)
