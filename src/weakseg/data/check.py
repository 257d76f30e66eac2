"""Looks at everything a collection holds before hours of training, and reports it all at once."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from weakseg.data.images import DECODE_ERRORS, orientation, oriented_size, read_mask
from weakseg.data.samples import Collection, Sample
from weakseg.data.sources import UNTAGGED_MEND
from weakseg.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CheckReport", "Problem", "check"]

Size = tuple[int, int]

_FEW = 5
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
    "unreadable-file": ("error", "image files that cannot be decoded", _AGAIN),
    "duplicate-id": (
        "error",
        "several images share one id, so their masks would overwrite each other",
        "rename them so that their paths differ in more than the suffix, and list each once",
    ),
    "untagged": ("error", "images that nobody has tagged", UNTAGGED_MEND),
    "unknown-tag": ("error", "tags that are not in the class list", "add them or correct them"),
    "no-negatives": (
        "error",
        "classes present in every train image, so that nothing tells them from the background",
        "add images without them: leave the tags of images without any class empty and say "
        "'untagged: negative' (--untagged negative)",
    ),
    "mask-missing-file": ("error", "mask files do not exist", "restore them"),
    "mask-unreadable": ("error", "masks that cannot be read", _MASKS),
    "mask-colours": ("error", "masks that hold colours instead of class ids", _MASKS),
    "mask-size": ("error", "masks whose size differs from their image's", _MASKS),
    "mask-ids": (
        "error",
        "masks with ids above the number of classes (255 = unsure is fine)",
        "list all classes in the order of mask ids (classes:)",
    ),
    "masks-incomplete": (
        "warning",
        "images without a mask in a split where others have one; they are not evaluated",
        "add their masks, or ignore this",
    ),
    "converted": (
        "warning",
        "images that are not 8-bit RGB (gray, palette, CMYK, 16-bit, transparent); they will be "
        "converted",
        "nothing, if they look right",
    ),
    "rotated": (
        "warning",
        "images with an EXIF rotation; it will be applied",
        "make sure that masks and other tools see them the same way",
    ),
    "same-image-in-splits": (
        "warning",
        "the same file lies in several splits, so evaluation sees training images",
        "remove it from one of them",
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
        f"classes with fewer than {_FEW} train images",
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
        cooccurrence: (K, K) int64, images of all splits with both classes; the diagonal counts
            each class.
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

    Images are decoded in full, on all cores. Ground-truth masks are opened here for their shape
    and ids only: nothing about their content is returned or used.

    Args:
        collection: What a source yielded.
        train: Splits that are trained on.
        progress: Called with (images done, images in all).
    """
    samples = collection.samples
    ledger = _Ledger()
    looks: list[_Look] = []
    with ThreadPoolExecutor() as pool:
        number = len(collection.classes)
        for look in pool.map(lambda s: _look_at(s, number), samples):
            looks.append(look)
            if progress is not None:
                progress(len(looks), len(samples))
    for sample, look in zip(samples, looks, strict=True):
        for code in look.codes:
            ledger.add(code, sample.id)
    _check_ids(samples, looks, ledger)
    _check_tags(collection, ledger)
    _check_balance(collection, train, ledger)
    _check_mask_cover(samples, ledger)
    matrix = collection.tag_matrix() if not ledger.has("unknown-tag") else _known_tags(collection)
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
        cooccurrence=counts.T @ counts,
    )


@dataclass
class _Ledger:
    """Collects items by code."""

    items: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, code: str, *items: str) -> None:
        self.items[code].extend(items)

    def has(self, code: str) -> bool:
        return code in self.items

    def problems(self) -> Iterator[Problem]:
        """In the order of the rules, which lists errors first."""
        for code, (severity, message, mend) in _RULES.items():
            if code in self.items:
                items = tuple(dict.fromkeys(self.items[code]))
                text = f"{len(items):,} × {message}" if items else message
                yield Problem(severity, code, text, mend, items)


# --- files ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Look:
    """What one image and its mask showed."""

    codes: list[str] = field(default_factory=list)
    size: Size | None = None
    digest: bytes | None = None


def _look_at(sample: Sample, classes: int) -> _Look:
    look = _Look()
    try:
        content = sample.image.read_bytes()
    except FileNotFoundError:
        look.codes.append("missing-file")
    except OSError:
        look.codes.append("unreadable-file")
    else:
        if content:
            look.digest = hashlib.blake2b(content, digest_size=16).digest()
            _look_at_image(content, look)
        else:
            look.codes.append("empty-file")
    if sample.mask is not None:
        _look_at_mask(sample.mask, look, classes)
    return look


def _look_at_image(content: bytes, look: _Look) -> None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = orientation(image) > 1
            size = oriented_size(image)
            image.load()
            converted = image.mode != "RGB" or "transparency" in image.info
    except UnidentifiedImageError:
        look.codes.append("not-an-image")
    except DECODE_ERRORS as error:
        short = "truncat" in str(error).lower()
        look.codes.append("truncated-file" if short else "unreadable-file")
    else:
        look.size = size
        look.codes += ["converted"] * converted + ["rotated"] * turned


def _look_at_mask(path: Path, look: _Look, classes: int) -> None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        look.codes.append("mask-missing-file")
        return
    except OSError:
        look.codes.append("mask-unreadable")
        return
    try:
        mask = read_mask(io.BytesIO(content), name=path)
    except UserError:
        look.codes.append("mask-colours" if _has_colours(content) else "mask-unreadable")
        return
    if look.size is not None and mask.shape != look.size:
        look.codes.append("mask-size")
    present = np.bincount(mask.ravel(), minlength=256)
    if present[classes + 1 : 255].any():
        look.codes.append("mask-ids")


def _has_colours(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format != "JPEG" and len(image.getbands()) > 1
    except DECODE_ERRORS:
        return False


def _check_ids(samples: Sequence[Sample], looks: Sequence[_Look], ledger: _Ledger) -> None:
    if not samples:
        ledger.add("no-images")
    # Case-insensitive file systems would make one file of cat/1.png and Cat/1.png.
    number = Counter(s.id.casefold() for s in samples)
    for sample in samples:
        if number[sample.id.casefold()] > 1:
            ledger.add("duplicate-id", sample.id)
    splits: dict[bytes, set[str]] = defaultdict(set)
    for sample, look in zip(samples, looks, strict=True):
        if look.digest is not None:
            splits[look.digest].add(sample.split)
    for sample, look in zip(samples, looks, strict=True):
        if look.digest is not None and len(splits[look.digest]) > 1:
            ledger.add("same-image-in-splits", sample.id)


def _check_mask_cover(samples: Iterable[Sample], ledger: _Ledger) -> None:
    samples = list(samples)
    covered = {s.split for s in samples if s.mask is not None}
    for sample in samples:
        if sample.mask is None and sample.split in covered:
            ledger.add("masks-incomplete", sample.id)


# --- tags -----------------------------------------------------------------------------------


def _check_tags(collection: Collection, ledger: _Ledger) -> None:
    known = set(collection.classes)
    for sample in collection:
        if sample.tags is None:
            ledger.add("untagged", sample.id)
        for tag in sample.tags or ():
            if tag not in known:
                ledger.add("unknown-tag", tag)
    uses = Counter(tag for sample in collection for tag in sample.tags or ())
    for rare, frequent in _lookalikes(uses):
        ledger.add("similar-tags", f"{rare} ({uses[rare]:,}) / {frequent} ({uses[frequent]:,})")


def _check_balance(collection: Collection, splits: Sequence[str], ledger: _Ledger) -> None:
    train = collection.split(*splits).samples
    if collection.samples and not train:
        ledger.add("no-train-images")
    uses = Counter(tag for sample in collection for tag in set(sample.tags or ()))
    in_train = Counter(tag for sample in train for tag in set(sample.tags or ()))
    tagged = sum(s.tags is not None for s in train)
    for name in collection.classes:
        if not uses[name]:
            ledger.add("class-without-images", name)
        elif train and in_train[name] < _FEW:
            ledger.add("few-images", name)
        if tagged and in_train[name] == tagged:
            ledger.add("no-negatives", name)


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


def _known_tags(collection: Collection) -> np.ndarray:
    """The tag matrix where some tags are not in the class list."""
    rows = [[name in (s.tags or ()) for name in collection.classes] for s in collection]
    return np.array(rows, dtype=np.uint8).reshape(len(rows), len(collection.classes))


def _lookalikes(uses: Counter[str]) -> Iterator[tuple[str, str]]:
    """Pairs (rare, frequent) of tags that may be one class."""
    ordered = sorted(uses, key=lambda tag: (-uses[tag], tag))
    letters = {tag: re.sub(r"[\W_]+", "", tag.casefold()) for tag in ordered}
    plain = {tag: _singular(letters[tag]) for tag in ordered}
    for i, frequent in enumerate(ordered):
        for rare in ordered[i + 1 :]:
            if (
                plain[rare] == plain[frequent]
                or uses[rare] * 10 <= uses[frequent]
                and _near(letters[rare], letters[frequent])
            ):
                yield rare, frequent


def _singular(word: str) -> str:
    """An English word without its plural ending; good enough to compare two."""
    for ending, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith("ss"):
            return word.removesuffix(ending) + singular
    return word


def _near(a: str, b: str) -> bool:
    """Whether one slip of the hand (two in long words) turns one word into the other."""
    shorter = min(len(a), len(b))
    # Short words differ by a letter all the time (car, cat), but not by a swap (cta).
    short = int(sorted(a) == sorted(b))
    allowed = short if shorter < 4 else 1 if shorter < 8 else 2
    # Digits number things: 'class1' and 'class2' are no slips.
    if re.findall(r"\d+", a) != re.findall(r"\d+", b) or abs(len(a) - len(b)) > allowed:
        return False
    return allowed > 0 and _slips(a, b) <= allowed


def _slips(a: str, b: str) -> int:
    """Edit distance with swaps of neighbours (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        after = [i]
        for j, y in enumerate(b, start=1):
            best = min(row[j] + 1, after[j - 1] + 1, row[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, before[j - 2] + 1)
            after.append(best)
        before, row = row, after
    return row[-1]


def _shown(items: Sequence[str]) -> str:
    more = f" and {len(items) - 5:,} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more
