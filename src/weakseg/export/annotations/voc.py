"""PASCAL VOC: a tree of indexed PNG masks, lists and links to the images.

::

    JPEGImages/cat/001.jpg             links to the images, or copies
    SegmentationClass/cat/001.png      0 background, 1 to K classes, 255 unsure, in VOC's colours
    ImageSets/Segmentation/train.txt   one id in each line
    labelmap.txt                       name:red,green,blue:: of each class, background first
    classes.txt                        the classes in the order of their ids

Reading (shared with CVAT) turns colours into classes by ``labelmap.txt``. Without one, values are
ids in the order of ``classes.txt``, or of the run's classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from weakseg.data.images import voc_palette, write_mask
from weakseg.errors import UserError
from weakseg.export.annotations.base import (
    UNSURE_ID,
    Format,
    Found,
    Item,
    Labels,
    MaskSet,
    MisfitError,
    check_split,
    decode_png,
    formats,
    place_image,
)
from weakseg.export.annotations.tree import Problems, Tree
from weakseg.files import atomic_path

__all__ = [
    "IndexedPng",
    "Voc",
    "label_map",
    "list_line",
    "read_classes",
    "read_tree",
    "write_text",
]

_AGAIN = "export it again as 'Segmentation mask 1.1' or PASCAL VOC"


@formats.register("voc")
class Voc(Format):
    """See the module's text."""

    def write(self, masks: MaskSet, out: Path) -> list[str]:
        """The tree."""
        lines: dict[str, list[str]] = {check_split(split): [] for split in masks.splits}
        for item in masks.items:
            lines[item.split].append(list_line(item.id))

        def work(item: Item, mask: np.ndarray) -> None:
            write_mask(out / "SegmentationClass" / f"{item.id}.png", mask)
            place_image(item, out / "JPEGImages" / item.file, masks.options.copy)

        for _ in masks.each(work, "voc", keep_unsure=True):
            pass
        for split, names in lines.items():
            write_text(out / "ImageSets" / "Segmentation" / f"{split}.txt", names)
        write_text(out / "labelmap.txt", label_map(masks, unsure=False))
        write_text(out / "classes.txt", list(masks.classes))
        if all(item.image.suffix.lower() in (".jpg", ".jpeg") for item in masks.items):
            return []
        return ["Some images are no JPEG files; most readers of VOC trees look for .jpg alone."]

    def fits(self, tree: Tree) -> bool:
        """True where there is a folder SegmentationClass."""
        return bool(tree.below("SegmentationClass", ".png"))

    def read(self, tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
        """All masks, and what the lists name beyond them."""
        yield from read_tree(tree, labels, problems)


# --- shared with CVAT -----------------------------------------------------------------------


def write_text(path: Path, lines: list[str]) -> None:
    """Writes lines, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def list_line(name: str) -> str:
    """A line of a list file: the name as it is, blanks included.

    Raises:
        UserError: The name cannot stand in one.
    """
    if name.startswith(("#", '"')) or name != name.strip() or len(name.splitlines()) != 1:
        raise UserError(
            "a list of VOC cannot hold a name with line breaks, or a '#' or quotes in front",
            where=repr(name),
            mend="rename the image, or export to coco",
        )
    return name


def label_map(masks: MaskSet, *, unsure: bool) -> list[str]:
    """Lines of ``labelmap.txt``.

    Raises:
        UserError: A class name cannot stand in one.
    """
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
    for label, name in masks.labels.items():
        if label > len(masks.classes) and not unsure:
            continue
        if (
            ":" in name
            or name.startswith("#")
            or name != name.strip()
            or len(name.splitlines()) != 1
        ):
            raise UserError(
                "a label map cannot hold a class name with ':', a leading '#' or line breaks",
                where=repr(name),
                mend="rename the class, or export to coco",
            )
        red, green, blue = masks.colour(label)
        lines.append(f"{name}:{red},{green},{blue}::")
    return lines


def read_tree(tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
    """Masks of ``SegmentationClass``; listed images without one are empty."""
    files = tree.below("SegmentationClass", ".png")
    if not files:
        raise UserError(
            "there is no folder SegmentationClass with PNG files", where=tree.where, mend=_AGAIN
        )
    colours, ids = _meaning(tree, labels, problems)
    for name, file in files.items():
        yield Found(name, IndexedPng(tree, file, colours, ids))
    listed: dict[str, tuple[str, ...]] = {}
    for file in tree.below("Segmentation", ".txt").values():
        for line in tree.text(file).splitlines():
            readings = _readings(line.strip())
            if readings and not files.keys() & set(readings):
                listed[readings[0]] = readings[1:]
    for name in sorted(listed):
        yield Found(name, _nothing, True, listed[name])


def _nothing(size: tuple[int, int]) -> np.ndarray:
    return np.zeros(size, dtype=np.uint8)


def _readings(line: str) -> tuple[str, ...]:
    """Names that a line of a list may mean: in quotes, else the whole line or its first word."""
    if line.startswith('"') and line.count('"') > 1:
        return (line[1 : line.index('"', 1)],)
    return tuple(dict.fromkeys((line, line.split()[0]))) if line else ()


def _meaning(
    tree: Tree, labels: Labels, problems: Problems
) -> tuple[dict[tuple[int, int, int], int | str] | None, dict[int, int | str]]:
    """Colour -> id (``None`` without a label map), and index -> id; text is an unknown label."""
    file = tree.named("labelmap.txt")
    if file is None:
        return None, read_classes(tree, labels)
    colours: dict[tuple[int, int, int], int | str] = {}
    ids: dict[int, int | str] = {}
    for line in tree.text(file).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        parts = rest.partition(":")[0].split(",")
        if len(parts) != 3 or not all(p.strip().isdecimal() and int(p) < 256 for p in parts):
            problems.add(
                f"lines of {file} that are not name:red,green,blue::", repr(line[:80]), _AGAIN
            )
            continue
        found = labels.find(name)
        colour = (int(parts[0]), int(parts[1]), int(parts[2]))
        if colour in colours:
            problems.add(f"colours that stand twice in {file}", repr(line[:80]), _AGAIN)
        colours[colour] = ids[len(ids)] = name if found is None else found
    void = voc_palette()[UNSURE_ID].tolist()
    colours.setdefault((void[0], void[1], void[2]), UNSURE_ID)
    ids.setdefault(UNSURE_ID, UNSURE_ID)
    return colours, ids


def read_classes(tree: Tree, labels: Labels) -> dict[int, int | str]:
    """Value of an indexed mask -> id, by ``classes.txt`` where there is one; text is an unknown label."""
    file = tree.named("classes.txt")
    names = list(labels.classes)
    if file is not None:
        names = [line.strip() for line in tree.text(file).splitlines() if line.strip()]
        names = names[1:] if names and labels.find(names[0]) == 0 else names
    found = {i: (name, labels.find(name)) for i, name in enumerate(names, start=1)}
    ids: dict[int, int | str] = {i: name if k is None else k for i, (name, k) in found.items()}
    return {0: 0, UNSURE_ID: UNSURE_ID, **ids}


class IndexedPng:
    """Decodes one mask; a label that is no class of the run is a misfit only where it is used."""

    def __init__(
        self,
        tree: Tree,
        file: str,
        colours: dict[tuple[int, int, int], int | str] | None,
        ids: dict[int, int | str],
    ) -> None:
        self.tree, self.file, self.colours, self.ids = tree, file, colours, ids

    def __call__(self, size: tuple[int, int]) -> np.ndarray:
        """The mask of an image of this size."""
        values, palette = decode_png(self.tree.read(self.file), size)
        if values.ndim == 3:
            if self.colours is None:
                raise MisfitError(
                    "it holds colours, and there is no labelmap.txt that explains them"
                )
            return self._of_colours(values)
        table = np.zeros(256, dtype=np.uint8)
        for value in np.unique(values).tolist():
            if palette is not None and self.colours is not None:
                red, green, blue = palette[value].tolist()
                table[value] = _known(
                    self.colours.get((red, green, blue)), f"the colour {red},{green},{blue}"
                )
            else:
                table[value] = _known(self.ids.get(value), f"the class id {value}")
        return table[values]

    def _of_colours(self, values: np.ndarray) -> np.ndarray:
        packed = values.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
        used, inverse = np.unique(packed, return_inverse=True)
        table = np.zeros(len(used), dtype=np.uint8)
        for i, code in enumerate(used.tolist()):
            colour = (code >> 16, code >> 8 & 255, code & 255)
            shown = ",".join(map(str, colour))
            table[i] = _known((self.colours or {}).get(colour), f"the colour {shown}")
        return table[inverse.reshape(packed.shape)]


def _known(found: int | str | None, what: str) -> int:
    if isinstance(found, int):
        return found
    if found is None:
        raise MisfitError(f"it holds {what}, which is no label")
    raise MisfitError(f"it holds the label {found!r}, which is no class of the run")
