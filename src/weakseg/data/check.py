"""Looks at everything a collection holds before hours of training, and reports it all at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weakseg.data.check_files import ASPECT, TINY, Look, look_at
from weakseg.data.check_masks import check_masks
from weakseg.data.check_tags import FEW, MOST_CLASSES, check_tags, known_tags
from weakseg.data.duplicates import near_copies
from weakseg.data.images import LARGE, PIXELS_PER_BYTE
from weakseg.data.samples import Collection, Sample
from weakseg.data.sources import UNTAGGED_MEND

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CheckReport", "Problem", "check"]

Size = tuple[int, int]

_AGAIN = "copy these files again from their origin, or leave them out"
_MASKS = "write masks again as 8-bit indexed PNG files of the image's size"

# code -> (severity, what is wrong with the items, how to mend it)
_RULES: dict[str, tuple[Literal["error", "warning"], str, str]] = {
    "no-images": ("error", "the collection is empty", "check the paths of the data"),
    "no-train-images": (
        "error",
        "no image is in a split that is trained on",
        "put the images to learn from in the split 'train', or name their split (data.train)",
    ),
    "missing-file": ("error", "image files do not exist", "restore them or remove their rows"),
    "empty-file": ("error", "image files of 0 bytes", _AGAIN),
    "truncated-file": ("error", "image files end too early", _AGAIN),
    "not-an-image": ("error", "files that are no images", "replace them or leave them out"),
    "forbidden-file": (
        "error",
        "image files that their permissions forbid to read",
        "change the permissions of these files and their folders",
    ),
    "unreadable-file": ("error", "image files that cannot be decoded", _AGAIN),
    "missing-band": (
        "error",
        "images that lack a band that is to be read (data.bands)",
        "name bands that all images have, or leave these images out",
    ),
    "decompression-bomb": (
        "error",
        f"image files that declare more than {LARGE:,} pixels, and more than {PIXELS_PER_BYTE} for "
        "each of their bytes, as no camera does; they were not decoded",
        "leave them out, or save them again from an origin that you trust",
    ),
    "duplicate-id": (
        "error",
        "several images share one id, so their masks would overwrite each other",
        "rename them so that their paths differ in more than the suffix, and list each once",
    ),
    "untagged": ("error", "images that nobody has tagged", UNTAGGED_MEND),
    "unknown-tag": ("error", "tags that are not in the class list", "add them or correct them"),
    "too-many-classes": (
        "error",
        f"classes beyond the {MOST_CLASSES} that masks can tell apart (ids are 8 bits, 255 is unsure)",
        "join classes, or leave some out",
    ),
    "no-negatives": (
        "error",
        "classes present in every train image, so that nothing tells them from the background",
        "add images without them: leave the tags of images without any class empty and say "
        "'untagged: negative' (--untagged negative)",
    ),
    "mask-missing-file": ("error", "mask files do not exist", "restore them"),
    "mask-forbidden": (
        "error",
        "mask files that their permissions forbid to read",
        "change the permissions of these files and their folders",
    ),
    "mask-unreadable": ("error", "masks that cannot be read", _MASKS),
    "mask-colours": (
        "error",
        "masks that hold colours instead of class ids",
        f"{_MASKS}; where white is one object and black is not, say so (data.masks_are: binary)",
    ),
    "mask-size": ("error", "masks whose size differs from their image's", _MASKS),
    "mask-ids": (
        "error",
        "masks with ids above the number of classes (255 = unsure is fine)",
        "list all classes in the order of mask ids (classes:)",
    ),
    "mask-binary": (
        "error",
        "masks show no class, but one value beside 0, which is no class's id (255 = unsure)",
        "if that value is the object, say so (data.masks_are: binary, --set data.masks_are=binary); "
        "else write the ids of classes, in the order of the class list",
    ),
    "masks-without-classes": (
        "error",
        "classes that images are tagged with, none of which has a pixel in any mask",
        "write the ids of classes, in the order of the class list (classes:), or leave masks out",
    ),
    "masks-of-other-classes": (
        "error",
        "images whose mask shows none of the classes that they are tagged with; these are most of "
        "those with both",
        "list the classes in the order of mask ids (classes:); check that masks belong to these "
        "images",
    ),
    "mask-of-other-classes": (
        "warning",
        "images whose mask shows none of the classes that they are tagged with",
        "draw them, or correct the tags; where white is the object, make all masks of one kind",
    ),
    "class-without-pixels": (
        "warning",
        "classes that images are tagged with, and that have no pixel in any mask",
        "list the classes in the order of mask ids (classes:), or draw them; else their evaluation "
        "says nothing",
    ),
    "masks-incomplete": (
        "warning",
        "images without a mask in a split where others have one; they are not evaluated",
        "add their masks, or ignore this",
    ),
    "converted": (
        "warning",
        "images that are not 8-bit RGB (gray, palette, CMYK, more bits or bands, transparent); they "
        "will be converted",
        "nothing, if they look right",
    ),
    "faint-image": (
        "warning",
        "images of more than 8 bits that become nearly one colour, as their values take up little "
        "of the collection's range",
        "set the range (data.depth), or keep images of other ranges apart",
    ),
    "beyond-depth": (
        "warning",
        "images of more than 8 bits with many values beyond the collection's range, which become "
        "black or white",
        "set the range (data.depth: bits, or [low, high])",
    ),
    "rotated": (
        "warning",
        "images with an EXIF rotation; it will be applied",
        "make sure that masks and other tools see them the same way",
    ),
    "animated": (
        "warning",
        "images of several frames or pages; the first one is used",
        "nothing, if the tags speak of the first; else save each frame as a file",
    ),
    "large-image": (
        "warning",
        f"images of more than {LARGE:,} pixels; each fills gigabytes of memory while it is read",
        "reduce them, or cut them into parts and tag each part",
    ),
    "tiny-image": (
        "warning",
        f"images of less than {TINY} pixels at the shorter side; a network's map of them is one "
        "cell high or wide",
        "leave them out, or find larger versions",
    ),
    "elongated": (
        "warning",
        f"images more than {ASPECT} times as long as they are wide",
        "cut them into parts and tag each part, or leave them out",
    ),
    "same-image-in-splits": (
        "warning",
        "the same file lies in several splits, so evaluation sees training images",
        "remove it from one of them",
    ),
    "near-copy-in-splits": (
        "warning",
        "images with a near copy (saved again, resized, cropped a little) in another split, so "
        "evaluation sees training images",
        "keep each pair in one split, or remove one of the two",
    ),
    "copies-with-other-tags": (
        "warning",
        "images that look the same and have different tags",
        "give both the tags of all that is seen in them, or remove one of the two",
    ),
    "always-together": (
        "warning",
        "classes that nearly always come with one other class, so that nothing tells which pixels "
        "belong to which of the two",
        "add images that show one of them alone, or make the two one class",
    ),
    "never-alone": (
        "warning",
        "classes that hardly any image shows without other classes",
        "add images that show them alone: these teach what they look like",
    ),
    "similar-tags": (
        "warning",
        "tags that look like spellings of one class",
        "make them one name, unless they are different classes",
    ),
    "class-without-images": (
        "warning",
        "classes of the list that no image has",
        "remove them from the list, or tag images of them",
    ),
    "few-images": (
        "warning",
        f"classes with fewer than {FEW} train images",
        "tag more images of them, or leave them out",
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of problem, with everything that has it.

    Attributes:
        severity: An ``"error"`` spoils a run; a ``"warning"`` may be intended.
        code: Stable name, such as ``"truncated-file"``.
        message: What is wrong, with the number of items.
        mend: What to do about it.
        items: Ids of the images, or names of the classes, in order.
    """

    severity: Literal["error", "warning"]
    code: str
    message: str
    mend: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found.

    Attributes:
        name: The collection's name.
        classes: Its classes, in the order of mask ids.
        tag_source: Where its tags came from.
        notes: What the source detected or assumed.
        problems: Errors first.
        sizes: Id -> (H, W) after EXIF, of each image that could be read.
        images_per_split: Split -> images.
        images_per_class: Split -> class -> images.
        negatives: Split -> images that are confirmed to show no class.
        tags_per_image: Split -> number of its images with 0, 1, 2, ... tags; those that nobody
            has tagged are left out.
        cooccurrence: (K, K) int64, images of all splits with both classes; the diagonal counts
            each class. (0, 0) where there are more classes than masks can hold.
    """

    name: str
    classes: tuple[str, ...]
    tag_source: str
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    sizes: dict[str, Size]
    images_per_split: dict[str, int]
    images_per_class: dict[str, dict[str, int]]
    negatives: dict[str, int]
    tags_per_image: dict[str, list[int]]
    cooccurrence: np.ndarray

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that must be mended."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems that may be intended."""
        return tuple(p for p in self.problems if p.severity == "warning")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "tag_source": self.tag_source,
            "notes": list(self.notes),
            "problems": [
                {
                    "severity": p.severity,
                    "code": p.code,
                    "message": p.message,
                    "mend": p.mend,
                    "items": list(p.items),
                }
                for p in self.problems
            ],
            "sizes": {key: list(size) for key, size in self.sizes.items()},
            "images_per_split": dict(self.images_per_split),
            "images_per_class": {k: dict(v) for k, v in self.images_per_class.items()},
            "negatives": dict(self.negatives),
            "tags_per_image": {k: list(v) for k, v in self.tags_per_image.items()},
            "cooccurrence": self.cooccurrence.tolist(),
        }

    def table(self) -> Table:
        """The problems as a rich table, errors first."""
        from rich.table import Table
        from rich.text import Text

        table = Table("", "problem", "where", "mend", title=f"check of {self.name}")
        for p in self.problems:
            colour = "red" if p.severity == "error" else "yellow"
            # Text, because file names may look like rich's markup.
            cells = (Text(p.severity, colour), p.message, _shown(p.items), p.mend)
            table.add_row(*(c if isinstance(c, Text) else Text(c) for c in cells))
        return table

    def class_table(self) -> Table:
        """Images of each class in each split as a rich table."""
        from rich.table import Table
        from rich.text import Text

        splits = list(self.images_per_split)
        table = Table("id", "class", title=f"{self.name}: tags from {self.tag_source}")
        for split in splits:
            table.add_column(Text(split), justify="right")
        for number, name in enumerate(self.classes, start=1):
            counts = (f"{self.images_per_class[s][name]:,}" for s in splits)
            table.add_row(str(number), Text(name), *counts)
        table.add_row("", "(none)", *(f"{self.negatives[s]:,}" for s in splits))
        table.add_row("", "images", *(f"{self.images_per_split[s]:,}" for s in splits))
        return table


def check(
    collection: Collection,
    *,
    train: Sequence[str] = ("train",),
    progress: Callable[[int, int], object] | None = None,
) -> CheckReport:
    """Opens every file and counts every tag; reports all problems at once and raises none.

    Image files are read to their end, on all cores. Ground-truth masks are opened here for their shape
    and ids only: nothing about their content is returned or used.

    Args:
        collection: What a source yielded.
        train: Splits that are trained on.
        progress: Called with (images done, images in all).
    """
    samples = collection.samples
    ledger = _Ledger()
    looks: list[Look] = []
    with ThreadPoolExecutor() as pool:
        for look in pool.map(look_at, samples):
            looks.append(look)
            if progress is not None:
                progress(len(looks), len(samples))
    for sample, look in zip(samples, looks, strict=True):
        for code in look.codes:
            ledger.add(code, sample.id)
    _check_ids(samples, ledger)
    _check_copies(samples, looks, ledger)
    for code, item in check_tags(collection, train):
        ledger.add(code, *([] if item is None else [item]))
    _check_mask_cover(samples, ledger)
    for code, item in check_masks(collection, [look.mask_ids for look in looks]):
        ledger.add(code, item)
    for name in collection.classes[MOST_CLASSES:]:
        ledger.add("too-many-classes", name)
    matrix = known_tags(collection)
    counts = matrix.astype(np.int64)
    return CheckReport(
        name=collection.name,
        classes=collection.classes,
        tag_source=collection.tag_source,
        notes=collection.notes,
        problems=tuple(ledger.problems()),
        sizes={s.id: k.size for s, k in zip(samples, looks, strict=True) if k.size is not None},
        images_per_split=dict(Counter(s.split for s in samples)),
        images_per_class=_per_class(collection, counts),
        negatives={
            split: sum(s.tags == () for s in samples if s.split == split)
            for split in collection.splits
        },
        tags_per_image={
            split: _histogram(
                [len(set(s.tags)) for s in samples if s.split == split and s.tags is not None]
            )
            for split in collection.splits
        },
        cooccurrence=_cooccurrence(counts),
    )


@dataclass
class _Ledger:
    """Collects items by code."""

    items: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, code: str, *items: str) -> None:
        self.items[code].extend(items)

    def problems(self) -> Iterator[Problem]:
        """In the order of the rules, which lists errors first."""
        for code, (severity, message, mend) in _RULES.items():
            if code in self.items:
                items = tuple(dict.fromkeys(self.items[code]))
                text = f"{len(items):,} × {message}" if items else message
                yield Problem(severity, code, text, mend, items)


def _check_ids(samples: Sequence[Sample], ledger: _Ledger) -> None:
    if not samples:
        ledger.add("no-images")
    # Case-insensitive file systems would make one file of cat/1.png and Cat/1.png.
    number = Counter(s.id.casefold() for s in samples)
    for sample in samples:
        if number[sample.id.casefold()] > 1:
            ledger.add("duplicate-id", sample.id)


def _check_copies(samples: Sequence[Sample], looks: Sequence[Look], ledger: _Ledger) -> None:
    splits: dict[bytes, set[str]] = defaultdict(set)
    for sample, look in zip(samples, looks, strict=True):
        if look.digest is not None:
            splits[look.digest].add(sample.split)
    for sample, look in zip(samples, looks, strict=True):
        if look.digest is not None and len(splits[look.digest]) > 1:
            ledger.add("same-image-in-splits", sample.id)
    thumbnails = [look.thumbnail for look in looks]
    for code, keys in (
        ("near-copy-in-splits", [sample.split for sample in samples]),
        ("copies-with-other-tags", [sample.tags and frozenset(sample.tags) for sample in samples]),
    ):
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        for i, j in near_copies(thumbnails, [number[key] for key in keys]):
            same_file = looks[i].digest == looks[j].digest
            untagged = samples[i].tags is None or samples[j].tags is None
            if not (untagged if code == "copies-with-other-tags" else same_file):
                ledger.add(code, f"{_named(samples[i], code)} / {_named(samples[j], code)}")


def _named(sample: Sample, code: str) -> str:
    words = sample.split if code == "near-copy-in-splits" else ", ".join(sample.tags or ())
    return f"{sample.id} ({words or 'none'})"


def _check_mask_cover(samples: Sequence[Sample], ledger: _Ledger) -> None:
    covered = {s.split for s in samples if s.mask is not None}
    for sample in samples:
        if sample.mask is None and sample.split in covered:
            ledger.add("masks-incomplete", sample.id)


def _per_class(collection: Collection, counts: np.ndarray) -> dict[str, dict[str, int]]:
    split_of = np.array([s.split for s in collection], dtype=object)
    return {
        split: {
            name: int(n)
            for name, n in zip(
                collection.classes, counts[split_of == split].sum(axis=0), strict=True
            )
        }
        for split in collection.splits
    }


def _cooccurrence(counts: np.ndarray) -> np.ndarray:
    if counts.shape[1] > MOST_CLASSES:  # by mistake, and the square of many classes is huge
        return np.zeros((0, 0), dtype=np.int64)
    return counts.T @ counts


def _histogram(numbers: Sequence[int]) -> list[int]:
    return np.bincount(np.array(numbers, dtype=np.int64)).tolist()


def _shown(items: Sequence[str]) -> str:
    more = f" and {len(items) - 5:,} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more
