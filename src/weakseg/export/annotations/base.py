"""The contract of annotation formats, their registry, and what they share.

A *format* is a class with two halves, registered under the name of the tool or the format::

    write(masks, out) -> notes          a folder that the tool imports as it is
    read(tree, labels, problems)        corrected masks, one after the other

``write`` gets a :class:`MaskSet` and an empty folder that is renamed when everything is in it. It
goes through the masks with :meth:`MaskSet.each`, which loads, checks and counts them.

``read`` gets the files as a :class:`~weakseg.export.annotations.tree.Tree` and yields a
:class:`Found` for each mask: the name that the file gives to the image, and a function that
decodes the mask once the image's size is known, so that nothing large is decoded before it is
known to fit. What it cannot use goes to ``problems``; it never guesses.

Unsure pixels (255): VOC and FiftyOne keep them. The other formats know no such thing, and a class
is not made up behind the user's back: by default those pixels are left without a label, which is
said; with ``unsure="label"`` they get the label ``unsure``, which must exist in the tool too.
Reading turns a label of that name into 255 again, unless a class of the run has that name.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import cv2
import numpy as np
from PIL import Image

from weakseg.console import track
from weakseg.data.images import DECODE_ERRORS, image_size, read_mask, voc_palette
from weakseg.data.sources import is_background, tidy
from weakseg.errors import UserError
from weakseg.export.annotations.tree import Problems, Tree
from weakseg.registry import Registry

__all__ = [
    "UNSURE",
    "UNSURE_ID",
    "Format",
    "Found",
    "Item",
    "Labels",
    "MaskSet",
    "MisfitError",
    "Options",
    "check_split",
    "decode_png",
    "dropped",
    "expect_size",
    "formats",
    "instances",
    "place_image",
]

UNSURE = "unsure"
"""The label that unsure pixels get where the user asks for one."""

UNSURE_ID = 255
"""What they are in masks; ``ops.confusion.IGNORE``, which formats do not import: it takes torch."""

T = TypeVar("T")


class MisfitError(ValueError):
    """A mask that does not fit the image, or holds what it must not; the text says what."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image with its mask.

    Attributes:
        id: Path relative to the images' root, without suffix.
        image: File of the image.
        mask: File of the mask.
        split: Name of its split.
        score: Estimated quality of the mask in [0, 1], where there is one.
    """

    id: str
    image: Path
    mask: Path
    split: str = "train"
    score: float | None = None

    @property
    def file(self) -> str:
        """Path of the image relative to the images' root, with suffix."""
        return self.id + self.image.suffix


@dataclass(frozen=True)
class Options:
    """What all formats know.

    Attributes:
        objects: What one object of the tool is: ``component`` (one connected area of a class) or
            ``class`` (all pixels of a class in an image); ``None`` for the format's own default.
        unsure: What unsure pixels become where the format cannot hold them: ``drop`` or ``label``.
        image_url: What stands before an image's relative path in Label Studio's tasks.
        copy: Copy images instead of linking to them, where the format wants them beside the masks.
    """

    objects: Literal["component", "class"] | None = None
    unsure: Literal["drop", "label"] = "drop"
    image_url: str | None = None
    copy: bool = False


@dataclass
class MaskSet:
    """What is exported.

    Attributes:
        classes: Foreground classes; class ``i`` has id ``i + 1`` in masks.
        items: Images with their masks.
        options: What the user chose.
        with_unsure: Images with unsure pixels, counted by :meth:`each`.
    """

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    options: Options = field(default_factory=Options)
    with_unsure: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order of appearance."""
        return tuple(dict.fromkeys(item.split for item in self.items))

    @property
    def labels(self) -> dict[int, str]:
        """Id -> name of everything that a pixel can be labelled with, background left out."""
        names = dict(enumerate(self.classes, start=1))
        if self.options.unsure == "label":
            names[len(names) + 1] = UNSURE
        return names

    def colour(self, label: int) -> tuple[int, int, int]:
        """Colour of a label: VOC's of its id."""
        is_unsure = self.options.unsure == "label" and label == len(self.classes) + 1
        red, green, blue = voc_palette()[UNSURE_ID if is_unsure else label].tolist()
        return red, green, blue

    def web_colour(self, label: int) -> str:
        """The same as ``#rrggbb``."""
        return "#" + "".join(f"{part:02x}" for part in self.colour(label))

    def each(
        self, work: Callable[[Item, np.ndarray], T], title: str, *, keep_unsure: bool = False
    ) -> Iterator[tuple[Item, T]]:
        """Runs ``work(item, mask)`` for each item, in threads, and yields its results in order.

        The (H, W) uint8 mask holds 0 and the ids of :attr:`labels`; with ``keep_unsure`` it holds
        255 as the file does.

        Raises:
            UserError: A mask cannot be read, does not fit its image, or holds unknown ids.
        """
        one = self.options.unsure == "label"
        if one and not keep_unsure and UNSURE in map(str.casefold, self.classes):
            raise UserError(
                f"a class is named {UNSURE!r}, so unsure pixels cannot be given that label",
                where="--unsure label",
                mend="rename the class, or leave --unsure out",
            )
        if one and not keep_unsure and len(self.classes) >= UNSURE_ID - 1:
            raise UserError(
                "there is no id left for the label 'unsure'",
                where="--unsure label",
                mend="leave --unsure out",
            )

        def load(item: Item) -> tuple[T, bool]:
            mask = read_mask(item.mask)
            self._check(item, mask)
            unsure = mask == UNSURE_ID
            if not keep_unsure:
                mask[unsure] = len(self.classes) + 1 if one else 0
            return work(item, mask), bool(unsure.any())

        with ThreadPoolExecutor() as pool:
            results = track(pool.map(load, self.items), title, len(self.items))
            for item, (result, unsure) in zip(self.items, results, strict=True):
                self.with_unsure += unsure
                yield item, result

    def _check(self, item: Item, mask: np.ndarray) -> None:
        size = image_size(item.image)
        if mask.shape != size:
            raise UserError(
                f"the mask is {mask.shape[1]} x {mask.shape[0]}, its image {size[1]} x {size[0]}",
                where=item.mask,
                mend="make the masks again: the image was replaced since",
            )
        wrong = np.unique(mask[(mask > len(self.classes)) & (mask != UNSURE_ID)])
        if len(wrong):
            raise UserError(
                f"the mask holds the class id {wrong[0]}, there are {len(self.classes)} classes",
                where=item.mask,
                mend="give all classes in the order of the ids (--classes)",
            )


@dataclass(frozen=True, slots=True)
class Found:
    """A corrected mask that a reader has found.

    Attributes:
        name: What the file calls the image: its relative path with or without suffix.
        load: Given the image's (H, W), the mask as (H, W) uint8 with the run's ids.
            Raises :class:`MisfitError`.
        empty: True where nothing at all was labelled, so that it may not have been looked at.
        other_names: Names to try where the first is unknown.
    """

    name: str
    load: Callable[[tuple[int, int]], np.ndarray]
    empty: bool = False
    other_names: tuple[str, ...] = ()


class Labels:
    """Names of labels to ids of the run.

    Args:
        classes: The run's classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        exact = {tidy(name): i for i, name in enumerate(self.classes, start=1)}
        folded: dict[str, list[int]] = {}
        for name, i in exact.items():
            folded.setdefault(name.casefold(), []).append(i)
        self._loose = {name: ids[0] for name, ids in folded.items() if len(ids) == 1}
        self._exact = exact

    def find(self, name: str) -> int | None:
        """Id of a label: a class in any case, 0 for the background, 255 for ``unsure``."""
        plain = tidy(name)
        found = self._exact.get(plain, self._loose.get(plain.casefold()))
        if found is None and is_background(plain):
            return 0
        if found is None and plain.casefold() == UNSURE:
            return UNSURE_ID
        return found

    def need(self, name: str, problems: Problems) -> int | None:
        """Like :meth:`find`; an unknown label is a problem."""
        found = self.find(name)
        if found is None:
            problems.add(
                "labels that are no class of the run",
                repr(name),
                f"use the run's classes ({', '.join(self.classes[:12])}"
                f"{', ...' if len(self.classes) > 12 else ''})",
            )
        return found


class Format(ABC):
    """One format; see the module's text."""

    writes: ClassVar[bool] = True
    reads: ClassVar[bool] = True

    def write(self, masks: MaskSet, out: Path) -> list[str]:
        """Writes all masks into the folder ``out`` and returns what the user should know."""
        raise NotImplementedError(f"{type(self).__name__} writes, so it must define write()")

    def read(self, tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
        """Yields the corrected masks."""
        raise NotImplementedError(f"{type(self).__name__} reads, so it must define read()")

    @abstractmethod
    def fits(self, tree: Tree) -> bool:
        """True where the files look like this format."""


formats: Registry[type[Format]] = Registry("format", "weakseg.export.annotations")


# --- shared by writers ----------------------------------------------------------------------


def dropped(masks: MaskSet) -> list[str]:
    """What to say of unsure pixels that were left without a label."""
    if not masks.with_unsure or masks.options.unsure == "label":
        return []
    return [
        f"{masks.with_unsure:,} of {len(masks.items):,} masks have unsure pixels (255); they are "
        "left without a label, so they come back as background unless somebody labels them "
        "(--unsure label gives them a label of their own)."
    ]


def instances(mask: np.ndarray, objects: str) -> tuple[np.ndarray, list[int]]:
    """Numbers the objects of a mask.

    Args:
        mask: (H, W) ids.
        objects: ``component`` (areas that touch, at corners too) or ``class``.

    Returns:
        (H, W) int32, 0 for background and 1 to N; and the class id of each.
    """
    numbers = np.zeros(mask.shape, dtype=np.int32)
    ids: list[int] = []
    for label in np.unique(mask[mask > 0]).tolist():
        own = (mask == label).astype(np.uint8)
        count, parts = 2, own.astype(np.int32)
        if objects != "class":
            count, parts = cv2.connectedComponents(own, connectivity=8)
        np.add(parts, len(ids), out=numbers, where=own > 0)
        ids += [label] * (count - 1)
    return numbers, ids


def place_image(item: Item, path: Path, copy: bool) -> None:
    """Puts an image into an export: a link to it, or a copy.

    Raises:
        UserError: The system refuses links.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        shutil.copyfile(item.image, path)
        return
    try:
        os.symlink(item.image.absolute(), path)
    except OSError as error:
        raise UserError(
            f"images cannot be linked here ({error})", where=path, mend="copy them: --copy"
        ) from None


def check_split(split: str) -> str:
    """A split's name as part of a file name.

    Raises:
        UserError: It cannot be one.
    """
    if split != Path(split).name or split in ("", ".", "..") or "\\" in split:
        raise UserError(
            f"the split {split!r} cannot name a file", where="--to", mend="give it a plain name"
        )
    return split


# --- shared by readers ----------------------------------------------------------------------


def decode_png(content: bytes, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """A PNG's values: (H, W) indices with the (256, 3) palette, or (H, W, 3) colours and ``None``.

    The size is compared before anything is decoded. Gray files are indices without a palette.

    Raises:
        MisfitError: It is no PNG, damaged, of another size, or of a kind that holds no mask.
    """
    try:
        with Image.open(BytesIO(content), formats=("PNG",)) as image:
            if (image.height, image.width) != size:
                raise MisfitError(_other_size((image.height, image.width), size))
            if image.mode in ("P", "L", "1"):
                palette = image.getpalette("RGB") if image.mode == "P" else None
                colours = None
                if palette is not None:
                    colours = np.zeros((256, 3), dtype=np.uint8)
                    given = np.array(palette, dtype=np.uint8).reshape(-1, 3)[:256]
                    colours[: len(given)] = given
                values = np.array(image)
                return values.astype(np.uint8), colours
            if image.mode in ("RGB", "RGBA"):
                return np.array(image.convert("RGB")), None
            if image.mode.startswith("I"):
                values = np.array(image)
                if values.min(initial=0) >= 0 and values.max(initial=0) <= 255:
                    return values.astype(np.uint8), None
            raise MisfitError(f"it has mode {image.mode}, which holds no class ids")
    except DECODE_ERRORS as error:
        if isinstance(error, MisfitError):
            raise
        raise MisfitError(
            f"no readable PNG ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None


def expect_size(found: tuple[object, object], size: tuple[int, int]) -> None:
    """Raises a MisfitError unless ``found`` (H, W) is the image's size."""
    if found != size:
        raise MisfitError(_other_size(found, size))


def _other_size(found: tuple[object, object], size: tuple[int, int]) -> str:
    return f"it is {found[1]} x {found[0]}, the image {size[1]} x {size[0]}"
