"""The source for COCO and for own data in its format: images and an *instances* JSON.

Category ids of any kind become 1 to K in their order (COCO: 1 to 90 with gaps become 1 to 80).
Without ``labels``, the usual layout is looked for under ``root``::

    annotations/instances_train2014.json    train2014/COCO_train2014_000000000009.jpg
    annotations/instances_val2014.json      val2014/COCO_val2014_000000000042.jpg

Tags and boxes come from the annotations. With ``masks: coco`` the outlines are drawn as masks too,
once, into the user's cache: they evaluate and nothing else. Each object is drawn with its class, of
several on one pixel the smallest wins; what only a crowd region, or an object without an outline,
covers is 255 (unsure). Masks that others drew in the order of the file differ (``overlap``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.console import track
from weakseg.data.check_tags import MOST_CLASSES
from weakseg.data.cocofile import FORMAT, Faults, InstancesFile, read_instances
from weakseg.data.images import image_size, write_mask
from weakseg.data.outlines import fill_polygons, read_runs
from weakseg.data.samples import Box, Collection, Sample
from weakseg.data.sources import (
    NameIndex,
    Untagged,
    check_untagged,
    class_list,
    count,
    in_class_order,
    is_background,
    locate,
    outputs_note,
    read_options,
    require_folder,
    require_plain_names,
    sample_id,
    scan,
    settle_untagged,
    sources,
    split_name,
    tidy,
    with_masks,
)
from weakseg.errors import UserError
from weakseg.files import cache_folder, write_json
from weakseg.registry import suggest

__all__ = ["coco"]

_VERSION = "coco-masks-v1"  # changes when a pixel changes
_UNSURE = 255
_MOST_PIXELS = 2**28
_YEARS = ("2014", "2017", "")
_CHOICES = {
    "crowd": ("unsure", "object", "background"),
    "crowd_tags": (True, False),
    "overlap": ("smaller-on-top", "drawing-order"),
}


@sources.register("coco")
def coco(
    *,
    root: str | Path | None,
    labels: str | Path | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | str | Path | None = None,
    untagged: Untagged | None = None,
    **options: Any,
) -> Collection:
    """Images, tags, boxes and masks of COCO's instances files.

    Args:
        root: Folder that holds the images, in folders such as ``train2014`` or directly.
        labels: The JSON of the split ``train``, relative to the working directory, to ``root`` or
            to its folder ``annotations``; None looks for the usual layout.
        masks: ``"coco"`` draws the outlines; a folder holds masks that were drawn before.
        classes: Names of the categories in the order of mask ids; by default all, by id. Objects
            of others are left out.
        untagged: ``"drop"`` or ``"negative"`` for images without any annotation.
        options: ``annotations``: split -> JSON, instead of ``labels``; ``crowd``: what a crowd
            region is in masks, ``unsure`` (255, the default), ``object`` or ``background``;
            ``crowd_tags``: whether a class that is there only as a crowd is tagged (default true);
            ``overlap``: ``smaller-on-top`` (default) or ``drawing-order``.

    Raises:
        UserError: Something is missing or contradictory; says how to mend it.
    """
    chosen = read_options(
        "coco", options, {"annotations": None, **{k: v[0] for k, v in _CHOICES.items()}}
    )
    _check_choices(chosen)
    check_untagged(untagged)
    path = require_folder(root, where="root", mend="give the folder of COCO's images")
    names, notes = class_list(classes, path)
    drawn = masks is not None and str(masks) == "coco"
    files = _annotation_files(path, labels, chosen["annotations"], notes)
    tables = {split: read_instances(file) for split, file in files.items()}
    known, ids = _categories(tables.values(), names, notes)
    skip = locate(masks, path, where="masks") if masks is not None and not drawn else None
    outputs: list[str] = []
    found = _Images(path, scan(path, skip=skip, left_out=outputs))
    notes += outputs_note(outputs)
    entries = [e for split, table in tables.items() for e in _entries(split, table, found)]
    _check_entries(entries, found, notes)
    samples = _tagged(entries, path, known, ids, chosen["crowd_tags"], notes)
    samples = settle_untagged(samples, untagged, notes)
    if drawn:
        samples = _with_drawn(samples, entries, known, ids, chosen, notes)
    else:
        samples = with_masks(samples, masks, path, notes)
    samples.sort(key=lambda s: s.id)
    source = f"COCO annotations ({', '.join(file.name for file in files.values())})"
    return Collection(path.resolve().name or "coco", known, tuple(samples), source, tuple(notes))


def _check_choices(chosen: Mapping[str, Any]) -> None:
    for name, allowed in _CHOICES.items():
        if chosen[name] not in allowed:
            words = " or ".join(str(a).lower() if isinstance(a, bool) else a for a in allowed)
            raise UserError(
                f"{name} is {chosen[name]!r}",
                where="source 'coco'",
                mend=f"write {words} (data.options.{name})",
            )


# --- the files ------------------------------------------------------------------------------


def _annotation_files(
    root: Path, labels: str | Path | None, annotations: Any, notes: list[str]
) -> dict[str, Path]:
    """Split -> JSON."""
    if annotations is not None:
        if labels is not None:
            raise UserError(
                "labels and options.annotations were both given",
                where="source 'coco'",
                mend="keep one of them",
            )
        if not isinstance(annotations, Mapping) or not annotations:
            raise UserError(
                f"annotations is {annotations!r}, not a mapping from splits to JSON files",
                where="data.options.annotations",
                mend="write, for example, {train: train.json, val: val.json}",
            )
        return {split_name(str(s)): _located(file, root) for s, file in annotations.items()}
    if labels is not None:
        return {"train": _located(labels, root)}
    return _usual_layout(root, notes)


def _located(file: str | Path, root: Path) -> Path:
    inside = root / "annotations" / file
    found = inside if inside.is_file() else locate(file, root, where="labels")
    if not found.is_file():
        raise UserError("this is a folder, not a JSON file", where=found, mend=FORMAT)
    return found


def _usual_layout(root: Path, notes: list[str]) -> dict[str, Path]:
    layouts = {}
    for year in _YEARS:
        files = {
            split: root / "annotations" / f"instances_{split}{year}.json"
            for split in ("train", "val")
        }
        there = {split: file for split, file in files.items() if file.is_file()}
        if "train" in there:
            layouts[year] = there
    if len(layouts) > 1:
        with_images = [y for y in layouts if (root / f"train{y}").is_dir()]
        layouts = {y: layouts[y] for y in with_images} if len(with_images) == 1 else layouts
    if len(layouts) == 1:
        (files,) = layouts.values()
        notes.append(f"Annotations found: {', '.join(f.name for f in files.values())}.")
        return files
    what = "there are annotations of several years" if layouts else "there are no annotations"
    raise UserError(
        what,
        where=root / "annotations",
        mend="name the files: labels (one JSON), or data.options.annotations "
        "({train: instances_train2014.json, val: instances_val2014.json})",
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- classes --------------------------------------------------------------------------------


def _categories(
    tables: Iterable[InstancesFile], names: tuple[str, ...] | None, notes: list[str]
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names, and category id -> class id (1 to K); others have none."""
    merged: dict[int, str] = {}
    for table in tables:
        for key, name in table.categories.items():
            if merged.setdefault(key, name) != name or list(merged.values()).count(name) > 1:
                raise UserError(
                    f"category {key} is {name!r} here, but the files of the splits differ",
                    where=table.path,
                    mend="export all splits with the same categories",
                )
    background = [key for key, name in merged.items() if is_background(name)]
    for key in background:
        notes.append(f"The category {merged.pop(key)!r} is left out: mask id 0 is background.")
    by_id = [merged[key] for key in sorted(merged)]
    unknown = [name for name in names or () if name not in by_id]
    if unknown:
        raise UserError(
            f"{count(len(unknown), 'class', 'classes')} not among the categories: "
            f"{', '.join(unknown[:10])}",
            where="classes",
            mend=suggest(unknown[0], by_id),
        )
    known = tuple(names or by_id)
    require_plain_names(known, "categories")
    if not known:
        raise UserError("the files name no class", where="categories", mend=FORMAT)
    column = {name: k for k, name in enumerate(known, start=1)}
    aside = len(by_id) - len(known)
    if aside:
        notes.append(
            f"{count(aside, 'category', 'categories')} not in the class list, left aside; what only "
            "they cover counts as background."
        )
    keys = sorted(merged)
    if names is None and keys != list(range(1, len(keys) + 1)):
        notes.append(
            f"Category ids {keys[0]} to {keys[-1]} become 1 to {len(keys)} in their order."
        )
    return known, {key: column[name] for key, name in merged.items() if name in column}


# --- images and their annotations -----------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    """One image of one file and the indices of its annotations."""

    split: str
    table: InstancesFile
    relative: str
    exists: bool
    size: tuple[Any, Any]
    annotations: list[int] = field(default_factory=list)

    @property
    def id(self) -> str:
        return sample_id(self.relative)


class _Images:
    """Finds the file that an entry of the JSON means."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root, self.files = root, files
        self._known = set(files)
        self._index: NameIndex | None = None

    def find(self, name: str, split: str, path: Path) -> tuple[str, ...] | None:
        """Relative files that ``name`` may mean, none if it is missing; None if it leads out."""
        name = name.replace("\\", "/")
        for folder in self._folders(split, path):
            if folder + name in self._known:
                return (folder + name,)
        if self._index is None:
            self._index = NameIndex(self.files, self.root)
        match = self._index.find(name)
        return None if match is None else match.files

    def _folders(self, split: str, path: Path) -> Iterator[str]:
        own = path.stem.rpartition("_")[2]  # instances_train2014 -> train2014
        for name in (own, split):
            yield f"{name}/"
            yield f"images/{name}/"
        if path.parent.is_relative_to(self.root) and path.parent != self.root:
            yield f"{path.parent.relative_to(self.root).as_posix()}/"
        yield ""
        yield "images/"


def _entries(split: str, table: InstancesFile, found: _Images) -> list[_Entry]:
    faults = Faults(table.path)
    entries: dict[Any, _Entry] = {}
    for key, image in table.images.items():
        name = tidy(image["file_name"])
        files = found.find(name, split, table.path)
        if files is None:
            faults.add("file_name that leads out of the image folder", name)
            continue
        if len(files) > 1:
            faults.add("file_name that several files have", name)
            continue
        relative = files[0] if files else "/".join(p for p in name.split("/") if p not in ("", "."))
        size = (image["height"], image["width"])
        entries[key] = _Entry(split, table, relative, bool(files), size)
    for index, key in enumerate(table.image):
        entry = entries.get(key)
        if entry is not None:
            entry.annotations.append(index)
        elif key not in table.images:
            faults.add("annotation of an image that is not listed", key)
    for category in sorted({*table.category} - {*table.categories}):
        faults.add("annotation of a category that is not listed", category)
    faults.check(
        f"name images relative to {found.root}, and export the file again if it is damaged"
    )
    return list(entries.values())


def _check_entries(entries: list[_Entry], found: _Images, notes: list[str]) -> None:
    if not any(entry.exists for entry in entries):
        raise UserError(
            f"none of the {count(len(entries), 'image')}, such as {entries[0].relative!r}, is in "
            f"{found.root}",
            where=entries[0].table.path,
            mend="give the folder that holds the images or their folders (train2014, val2014)",
        )
    first: dict[str, _Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.relative, entry)
        if other is not entry:
            raise UserError(
                f"{entry.relative!r} stands twice, in the splits {other.split!r} and "
                f"{entry.split!r}",
                where=entry.table.path,
                mend="list each image once",
            )
    unlisted = len(found.files) - sum(entry.exists for entry in entries)
    if unlisted:
        notes.append(f"{count(unlisted, 'image')} in no annotation file, left out.")


def _tagged(
    entries: list[_Entry],
    root: Path,
    classes: tuple[str, ...],
    ids: dict[int, int],
    crowd_tags: bool,
    notes: list[str],
) -> list[Sample]:
    samples = []
    bare, crowded, negative = 0, 0, 0
    for entry in entries:
        table, boxes, present = entry.table, [], set()
        looked_at = has_crowd = False
        for i in entry.annotations:
            crowd, k = bool(table.crowd[i]), ids.get(table.category[i])
            looked_at |= not crowd or crowd_tags or k is None
            has_crowd |= crowd and k is not None
            if k is None or (crowd and not crowd_tags):
                continue
            present.add(classes[k - 1])
            x, y, width, height = table.box[4 * i : 4 * i + 4]
            if not crowd and width > 0 and height > 0:
                boxes.append(Box(classes[k - 1], x, y, x + width, y + height))
        crowded += has_crowd
        # Nobody says that an image without annotations was looked at.
        bare += not looked_at
        negative += looked_at and not present
        tags = in_class_order(present, classes) if looked_at else None
        image = root / entry.relative
        samples.append(Sample(entry.id, image, tags, entry.split, boxes=tuple(boxes)))
    if bare:
        notes.append(
            f"{count(bare, 'image')} without annotations: COCO's own were searched for every "
            "category, so they may count as confirmed negatives (untagged: negative); elsewhere they "
            "may be unfinished (untagged: drop)."
        )
    if negative:
        notes.append(
            f"{count(negative, 'image')} with objects of other categories alone counted as confirmed "
            "negatives."
        )
    if crowded:
        effect = "tag their class too" if crowd_tags else "tag nothing"
        notes.append(f"Crowd regions, in {count(crowded, 'image')}, {effect}; they give no boxes.")
    return samples


# --- masks ----------------------------------------------------------------------------------


def _with_drawn(
    samples: list[Sample],
    entries: list[_Entry],
    classes: tuple[str, ...],
    ids: dict[int, int],
    chosen: Mapping[str, Any],
    notes: list[str],
) -> list[Sample]:
    """Gives each sample its outlines as a mask in the cache, drawn where it is not there yet."""
    if len(classes) > MOST_CLASSES:
        raise UserError(
            f"{len(classes)} classes do not fit in a mask of 8 bits",
            where="masks: coco",
            mend=f"name at most {MOST_CLASSES} classes (classes:), or leave masks out",
        )
    by_id = {entry.id: entry for entry in entries if entry.exists}
    wanted = {s.id: s for s in samples if s.id in by_id}
    tables = {entry.split: entry.table for entry in entries}
    key = {
        "files": [_digest(table.path) for table in tables.values()],
        "classes": sorted(ids.items()),
        "images": sorted((key, by_id[key].size) for key in wanted),
        "crowd": chosen["crowd"],
        "overlap": chosen["overlap"],
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = cache_folder() / _VERSION / digest[:16]
    if not (folder / "done.json").is_file():
        _draw_all(wanted, by_id, ids, chosen, folder)
        write_json(folder / "done.json", {"images": len(wanted), **chosen, "classes": classes})
    order = {
        "smaller-on-top": "the smaller of two objects lies on top",
        "drawing-order": "objects lie on top of each other in the order of the file",
    }[chosen["overlap"]]
    crowd = {
        "unsure": "crowd regions are 255 (unsure)",
        "object": "crowd regions count as their class",
        "background": "crowd regions count as background",
    }[chosen["crowd"]]
    notes.append(f"{count(len(wanted), 'mask')} drawn from outlines: {order}, {crowd} ({folder}).")
    return [replace(s, mask=folder / f"{s.id}.png") if s.id in wanted else s for s in samples]


def _draw_all(
    wanted: Mapping[str, Sample],
    by_id: Mapping[str, _Entry],
    ids: Mapping[int, int],
    chosen: Mapping[str, Any],
    folder: Path,
) -> None:
    def one(key: str) -> str | None:
        file = folder / f"{key}.png"
        if file.is_file():
            return None
        try:
            write_mask(file, _drawn(by_id[key], wanted[key].image, ids, chosen))
        except ValueError as error:
            return str(error)
        return None

    faults: dict[Path, Faults] = {}
    with ThreadPoolExecutor() as pool:
        results = track(pool.map(one, wanted), "COCO masks", len(wanted))
        for key, what in zip(wanted, results, strict=True):
            if what is not None:
                path = by_id[key].table.path
                faults.setdefault(path, Faults(path)).add(what, key)
    for found in faults.values():
        found.check("export the file again, or leave masks out: they only evaluate")


def _drawn(
    entry: _Entry, image: Path, ids: Mapping[int, int], chosen: Mapping[str, Any]
) -> np.ndarray:
    """(H, W) uint8 mask of one image.

    Raises:
        ValueError: An outline is damaged.
    """
    size = _size(entry, image)
    layers: list[tuple[bool, int, _Layer]] = []  # (surely the object, its order, its pixels)
    for order, i in enumerate(entry.annotations):
        k, crowd = ids.get(entry.table.category[i]), bool(entry.table.crowd[i])
        if k is None or (crowd and chosen["crowd"] == "background"):
            continue
        filled = _filled(entry.table.outline(i), size)
        sure = filled is not None and not (crowd and chosen["crowd"] == "unsure")
        if filled is None:
            filled = _box_filled(entry.table.box[4 * i : 4 * i + 4], size)
        layer = _Layer.of(filled, k if sure else _UNSURE)
        by_size = chosen["overlap"] == "smaller-on-top"
        layers.append((sure, -layer.area if by_size else order, layer))
    if chosen["overlap"] == "smaller-on-top":  # what is unsure never hides an object
        layers.sort(key=lambda entry: entry[:2])
    mask = np.zeros(size, dtype=np.uint8)
    for _, _, layer in layers:
        mask[layer.rows, layer.columns][layer.pixels] = layer.value
    return mask


@dataclass(frozen=True, slots=True)
class _Layer:
    """One object, cut out of its image, so that many fit in memory."""

    rows: slice
    columns: slice
    pixels: np.ndarray
    value: int
    area: int

    @classmethod
    def of(cls, filled: np.ndarray, value: int) -> _Layer:
        rows, columns = _span(np.any(filled, axis=1)), _span(np.any(filled, axis=0))
        pixels = filled[rows, columns].copy()
        return cls(rows, columns, pixels, value, int(pixels.sum()))


def _span(used: np.ndarray) -> slice:
    found = np.flatnonzero(used)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _size(entry: _Entry, image: Path) -> tuple[int, int]:
    height, width = entry.size
    if height is None or width is None:
        return image_size(image)
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError("image whose height and width are no whole numbers")
    if height * width > _MOST_PIXELS:
        raise ValueError(f"image of more than {_MOST_PIXELS:,} pixels")
    return height, width


def _filled(outline: Any, size: tuple[int, int]) -> np.ndarray | None:
    """(H, W) bool of a segmentation; None where there is none."""
    if isinstance(outline, dict):
        return read_runs(outline, size)
    if outline is None or outline == []:
        return None
    if not isinstance(outline, list) or not all(isinstance(part, list) for part in outline):
        raise ValueError("segmentation that is neither polygons nor run lengths")
    parts = [part for part in outline if len(part) >= 6]  # less than three points have no inside
    return fill_polygons(parts, size) if parts else None


def _box_filled(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return np.zeros(size, dtype=bool)
    return fill_polygons([[x, y, x + width, y, x + width, y + height, x, y + height]], size)
