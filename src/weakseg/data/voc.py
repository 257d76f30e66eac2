"""The source for PASCAL VOC 2012 and for own data in the layout of its devkit.

``JPEGImages/*.jpg``, ``Annotations/*.xml``, ``ImageSets/Segmentation/{train,val}.txt``, and masks
in ``SegmentationClass`` or, for images that have none there, ``SegmentationClassAug``. Ids are
relative to ``JPEGImages``: ``2007_000032``. Boxes come from the XML, those of difficult objects
included; its pixels count from 1 and a box holds its last ones.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from weakseg.data.images import read_mask
from weakseg.data.samples import Box, Collection, Sample
from weakseg.data.sources import (
    NameIndex,
    Untagged,
    check_untagged,
    class_list,
    count,
    has_controls,
    in_class_order,
    locate,
    read_options,
    require_folder,
    sample_id,
    scan,
    settle_untagged,
    sources,
    tidy,
)
from weakseg.data.table import read_table
from weakseg.errors import UserError

__all__ = ["VOC_CLASSES", "listed_ids", "voc"]

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

_LISTS = {"train": "train", "val": "val"}
_DEVKIT = "give the folder that holds JPEGImages, such as VOCdevkit/VOC2012"

Tags = dict[str, tuple[str, ...] | None]


@sources.register("voc")
def voc(
    *,
    root: str | Path | None,
    labels: str | Path | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | str | Path | None = None,
    untagged: Untagged | None = None,
    **options: Any,
) -> Collection:
    """Images, tags and masks of a devkit tree.

    Args:
        root: Folder that holds ``JPEGImages`` (or ``VOC2012``, or ``VOCdevkit/VOC2012``).
        labels: ``None`` or ``"xml"`` for the objects of ``Annotations``, difficult ones included;
            ``"masks"`` for the classes in the ground-truth masks; a tag table; or a
            ``cls_labels.npy``. None without ``Annotations`` takes ``labels.csv`` of the root.
        masks: Folder of masks; by default those of the devkit.
        classes: Class names in the order of mask ids; by default the 20 of VOC.
        untagged: ``"drop"`` or ``"negative"`` for images without a tag.
        options: ``lists``: split name -> list file (name in ``ImageSets/Segmentation`` or path);
            by default ``{"train": "train", "val": "val"}``.

    Raises:
        UserError: Something is missing or contradictory; says how to mend it.
    """
    chosen = read_options("voc", options, {"lists": None})
    check_untagged(untagged)
    path, notes = _devkit(require_folder(root, where="root", mend=_DEVKIT))
    names, more = class_list(classes, path)
    notes += more
    known = names or VOC_CLASSES
    samples = _listed(path, chosen["lists"], notes)
    samples = _with_masks(samples, path, masks, notes)
    annotated = _read_annotations(samples, path)
    tags, tag_source = _tags(samples, annotated, labels, path, known, untagged, notes)
    boxes = _boxes(annotated, known)
    if boxes:
        notes.append(
            f"{count(len(boxes), 'image')} with boxes, those of difficult objects included."
        )
    samples = [replace(s, tags=tags.get(s.id), boxes=boxes.get(s.id)) for s in samples]
    samples = settle_untagged(samples, untagged, notes)
    samples.sort(key=lambda s: (s.id, s.split))
    name = path.resolve().name or "voc"
    return Collection(name, known, tuple(samples), tag_source, tuple(notes))


def _devkit(root: Path) -> tuple[Path, list[str]]:
    for inner in ("", "VOC2012", "VOCdevkit/VOC2012"):
        if (root / inner / "JPEGImages").is_dir():
            return root / inner, [f"The devkit stands in {inner}."] if inner else []
    raise UserError("there is no folder JPEGImages in it", where=root, mend=_DEVKIT)


# --- lists and files ------------------------------------------------------------------------


def listed_ids(path: str | Path) -> list[str]:
    """Image ids of a list file, in its order, without repetition.

    Accepts bare ids, ids with a flag (``2007_000032 -1``) and paths of image and mask
    (``/JPEGImages/x.jpg /SegmentationClassAug/x.png``, SBD's ``img/x.jpg cls/x.mat``).

    Raises:
        UserError: The file cannot be read or holds no id.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the list cannot be read ({error})", where=path, mend="check the path of the list"
        ) from error
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    ids = dict.fromkeys(sample_id(name.replace("\\", "/").rpartition("/")[2]) for name in first)
    if not ids:
        raise UserError("the list is empty", where=path, mend="write one image id in each line")
    if any(map(has_controls, ids)):
        raise UserError(
            "the list holds control characters, so it is no text",
            where=path,
            mend="write one image id in each line",
        )
    return list(ids)


def _listed(root: Path, lists: Mapping[str, str | Path] | None, notes: list[str]) -> list[Sample]:
    """Untagged samples of all lists."""
    if lists is not None and (not isinstance(lists, Mapping) or not lists):
        raise UserError(
            f"lists is {lists!r}, not a mapping from splits to list files",
            where="data.options.lists",
            mend="write, for example, lists: {train: train_aug, val: val}",
        )
    images = {sample_id(file): file for file in scan(root / "JPEGImages")}
    samples, seen = [], set()
    for split, name in (lists or _LISTS).items():
        file = _list_file(root, name)
        if file is None and lists is None and split != "train":
            notes.append(f"There is no list {name}.txt, so there is no split {split!r}.")
            continue
        for key in listed_ids(file or _no_list(root, name)):
            image = root / "JPEGImages" / images.get(key, f"{key}.jpg")
            samples.append(Sample(key, image, None, split))
            seen.add(key)
    unlisted = len(set(images) - seen)
    if unlisted:
        notes.append(f"{count(unlisted, 'image')} in no list, left out.")
    return samples


def _list_file(root: Path, name: str | Path) -> Path | None:
    folder = root / "ImageSets" / "Segmentation"
    for file in (folder / f"{name}.txt", folder / name, root / name, Path(name).expanduser()):
        if file.is_file():
            return file
    return None


def _no_list(root: Path, name: str | Path) -> Path:
    folder = root / "ImageSets" / "Segmentation"
    there = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "no list at all"
    raise UserError(
        f"there is no list {str(name)!r}",
        where=folder,
        mend=f"give a path, or one of the lists that are there: {there} "
        "(lists: {train: ..., val: ...})",
    )


def _with_masks(
    samples: Sequence[Sample], root: Path, masks: str | Path | None, notes: list[str]
) -> list[Sample]:
    """Official masks win over SBD's, because only they mark unsure borders."""
    if masks is not None:
        folders = [locate(masks, root, where="masks")]
    else:
        folders = [root / name for name in ("SegmentationClass", "SegmentationClassAug")]
    there = [(f, {p.name for p in f.glob("*.png")}) for f in folders if f.is_dir()]
    found = []
    used: Counter[str] = Counter()
    for sample in samples:
        name = f"{sample.id}.png"
        folder = next((f for f, names in there if name in names), None)
        used[folder.name if folder else ""] += 1
        found.append(replace(sample, mask=folder / name) if folder else sample)
    number = len(samples) - used.pop("", 0)
    if masks is not None and not number:
        raise UserError(
            "it holds no mask of any listed image",
            where=folders[0],
            mend="name masks after the images, or leave masks out: they only evaluate",
        )
    if number:
        where = ", ".join(f"{n:,} in {folder}" for folder, n in used.items())
        notes.append(f"{number:,} of {count(len(samples), 'image')} with a mask ({where}).")
    return found


# --- tags -----------------------------------------------------------------------------------


def _tags(
    samples: Sequence[Sample],
    annotated: _Annotations,
    labels: str | Path | None,
    root: Path,
    classes: Sequence[str],
    untagged: Untagged | None,
    notes: list[str],
) -> tuple[Tags, str]:
    """Id -> tags, and where they come from in words."""
    if labels is None:
        labels = _default_labels(root, notes)
    if labels == "xml":
        return _xml_tags(
            annotated, root, classes
        ), "VOC XML annotations (difficult objects counted)"
    if labels == "masks":
        notes.append(
            "ATTENTION: the tags were computed from ground-truth masks, a cleaner supervision "
            "than the usual XML tags; say so next to every number."
        )
        return _mask_tags(samples, root, classes), "ground-truth masks (not the XML tags)"
    table = locate(labels, root, where="labels")
    return _table_tags(samples, table, root, classes, untagged, notes), f"table {table.name}"


def _default_labels(root: Path, notes: list[str]) -> str | Path:
    if (root / "Annotations").is_dir():
        return "xml"
    if (root / "labels.csv").is_file():
        notes.append("There are no XML annotations; tags are taken from labels.csv of the root.")
        return root / "labels.csv"
    raise UserError(
        "there are neither Annotations nor a labels.csv",
        where=root,
        mend="give a tag table or a cls_labels.npy (labels: PATH), or compute the tags from the "
        "ground-truth masks (labels: masks)",
    )


def _xml_tags(annotated: _Annotations, root: Path, classes: Sequence[str]) -> Tags:
    folder = root / "Annotations"
    if not folder.is_dir():
        raise UserError("there are no XML annotations", where=folder, mend="give a tag table")
    if annotated.refused:
        raise UserError(
            f"{count(len(annotated.refused), 'XML file')} with a document type (DOCTYPE), such as "
            f"{annotated.refused[0]}.xml; it can define entities that fill the memory, and was not "
            "read",
            where=folder,
            mend="remove <!DOCTYPE ...>: annotations need none",
        )
    if annotated.broken:
        raise UserError(
            f"{count(len(annotated.broken), 'XML file')} cannot be read, such as "
            f"{annotated.broken[0]}.xml",
            where=folder,
            mend="copy them again from their origin",
        )
    tags: Tags = {}
    unknown: dict[str, str] = {}
    for key, objects in annotated.objects.items():
        names = [thing.name for thing in objects]
        unknown.update({name: key for name in names if name not in classes})
        # An annotation without objects may just be unfinished: it counts as untagged.
        tags[key] = in_class_order(names, classes) or None
    if unknown:
        name, key = min(unknown.items())
        raise UserError(
            f"objects of {count(len(unknown), 'unknown class', 'unknown classes')}: "
            f"{', '.join(sorted(unknown)[:10])} ({name!r} in {key}.xml)",
            where=folder,
            mend="list all classes of the annotations (classes:)",
        )
    return tags


def _boxes(annotated: _Annotations, classes: Sequence[str]) -> dict[str, tuple[Box, ...]]:
    """Id -> boxes, of the images whose annotation gives one for each of its objects."""
    boxes: dict[str, tuple[Box, ...]] = {}
    for key, objects in annotated.objects.items():
        kept = [thing for thing in objects if thing.name in classes]
        if kept and all(thing.box for thing in kept):
            boxes[key] = tuple(Box(o.name, *o.box) for o in kept if o.box)
    return boxes


@dataclass
class _Annotations:
    """The XML files of the listed images: id -> objects, and the ids that could not be read."""

    objects: dict[str, list[_Object]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def _read_annotations(samples: Sequence[Sample], root: Path) -> _Annotations:
    found, folder = _Annotations(), root / "Annotations"
    if not folder.is_dir():
        return found
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries}
    for key in dict.fromkeys(s.id for s in samples):
        if f"{key}.xml" not in present:
            continue
        try:
            found.objects[key] = _xml_objects(folder / f"{key}.xml")
        except _DoctypeError:
            found.refused.append(key)
        except (OSError, ElementTree.ParseError, ValueError):
            found.broken.append(key)
    return found


@dataclass(frozen=True, slots=True)
class _Object:
    """An object of an annotation; its box is (x1, y1, x2, y2), the last two exclusive."""

    name: str
    box: tuple[float, float, float, float] | None


class _DoctypeError(ValueError):
    """The annotation declares a document type."""


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree of a file without a document type."""

    def doctype(self, *_: object) -> None:
        raise _DoctypeError


def _xml_objects(path: Path) -> list[_Object]:
    """Objects of an annotation; parts of them (head, hand, foot) have names too, but are none.

    Raises:
        ValueError: The file declares a document type.
    """
    tree = ElementTree.parse(path, ElementTree.XMLParser(target=_Builder()))
    found = []
    for node in tree.getroot().iter("object"):
        name = tidy(node.findtext("name") or "")
        if name:
            found.append(_Object(name, _xml_box(node.find("bndbox"))))
    return found


def _xml_box(node: ElementTree.Element | None) -> tuple[float, float, float, float] | None:
    """None for a box that is none: it does not spoil the tags."""
    if node is None:
        return None
    try:
        x1, y1, x2, y2 = (float(node.findtext(s) or "") for s in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None
    sound = -1e6 < x1 <= x2 < 1e6 and -1e6 < y1 <= y2 < 1e6
    return (x1 - 1, y1 - 1, x2, y2) if sound else None


def _mask_tags(samples: Sequence[Sample], root: Path, classes: Sequence[str]) -> Tags:
    masks = {s.id: s.mask for s in samples if s.mask is not None}
    if not masks:
        raise UserError("there are no masks to compute tags from", where=root, mend="give labels")
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_ids_of, masks.values()))
    tags: Tags = {}
    for key, ids in zip(masks, found, strict=True):
        if ids[-1:] and ids[-1] > len(classes):
            raise UserError(
                f"it holds the class id {ids[-1]}, but there are {len(classes)} classes",
                where=masks[key],
                mend="list all classes in the order of mask ids (classes:)",
            )
        tags[key] = tuple(classes[i - 1] for i in ids) or None
    return tags


def _ids_of(mask: Path) -> list[int]:
    ids = np.unique(read_mask(mask))
    return [int(i) for i in ids if i not in (0, 255)]


def _table_tags(
    samples: Sequence[Sample],
    path: Path,
    root: Path,
    classes: Sequence[str],
    untagged: Untagged | None,
    notes: list[str],
) -> Tags:
    """Tags of the listed images; rows of others are left aside, the lists make the splits."""
    table = read_table(path, classes=classes, untagged=untagged)
    notes += table.notes
    tags: Tags = {}
    aside = 0
    find = _finder(samples, root)
    for row in table.rows:
        key = find(row.name)
        if key is None:
            aside += 1
        elif row.tags is None:
            tags.setdefault(key, None)
        else:
            tags[key] = in_class_order((*(tags.get(key) or ()), *row.tags), classes)
    if not tags:
        raise UserError(
            f"no row names a listed image; the first names {table.rows[0].name!r}",
            where=path,
            mend=f"name images like {samples[0].image.name}",
        )
    if aside:
        notes.append(f"{count(aside, 'row')} of {path.name} for images in no list, left aside.")
    return tags


def _finder(samples: Iterable[Sample], root: Path) -> Callable[[str], str | None]:
    folder = root / "JPEGImages"
    ids = {s.image.relative_to(folder).as_posix(): s.id for s in samples}
    index = NameIndex(ids, folder)

    def find(name: str) -> str | None:
        match = index.find(name)
        return ids[match.files[0]] if match is not None and match.files else None

    return find
