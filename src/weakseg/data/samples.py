"""What every source yields: samples, gathered in a collection.

A *sample* is one image with its tags and, only if the user has them, a ground-truth mask and
boxes. They evaluate: the check looks whether they fit, the evaluation and the report compare with
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from weakseg.data.depth import Reading
from weakseg.data.images import read_binary_mask, read_image, read_mask
from weakseg.digests import digests, together
from weakseg.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "Box", "Collection", "Sample", "lot"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Box:
    """A ground-truth box, for evaluation only.

    Attributes:
        tag: Name of its class.
        x1: Left edge, in pixels from the image's left.
        y1: Upper edge.
        x2: Right edge, exclusive: the box is ``x2 - x1`` pixels wide.
        y2: Lower edge, exclusive.
    """

    tag: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One image.

    Attributes:
        id: Path relative to the collection's root, without suffix, with ``/``: every output
            mirrors it (``cat/001.jpg`` -> ``cat/001.png``).
        image: File of the image.
        tags: Names of the classes present; an empty tuple is a confirmed negative; ``None`` means
            that nobody has tagged it.
        split: ``"train"``, ``"val"`` or any other name the table gives.
        mask: Ground-truth mask, for evaluation only.
        boxes: Ground-truth boxes, for evaluation only; ``None`` where the source has none.
        reading: How its pixels become 8-bit RGB; the same in all of a collection.
        mask_id: Id that every white pixel of the mask means (255: nobody knows); ``None`` where its
            pixels are ids.
    """

    id: str
    image: Path
    tags: tuple[str, ...] | None
    split: str = "train"
    mask: Path | None = None
    boxes: tuple[Box, ...] | None = None
    reading: Reading = Reading()
    mask_id: int | None = None

    def pixels(self, max_side: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8 RGB, as :func:`weakseg.data.images.read_image` gives it."""
        return read_image(self.image, max_side=max_side, reading=self.reading)

    def truth(self, content: BinaryIO | None = None) -> np.ndarray:
        """(H, W) uint8 ids of the ground-truth mask, from its file or its content.

        Raises:
            UserError: It cannot be read.
        """
        if self.mask is None:
            raise ValueError(f"{self.id} has no ground truth")
        source = self.mask if content is None else content
        if self.mask_id is None:
            return read_mask(source, name=self.mask)
        return read_binary_mask(source, self.mask_id, name=self.mask)


@dataclass(frozen=True)
class Collection:
    """Samples and the classes they speak of.

    Attributes:
        name: Short name for tables and reports.
        classes: Foreground classes in order; class ``i`` has id ``i + 1`` in masks.
        samples: All samples of all splits, in a fixed order.
        tag_source: Where the tags came from, in words (for example ``"table labels.csv"``).
        notes: What the source detected or assumed, one sentence each, for the user to see.
    """

    name: str
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    tag_source: str
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order of appearance."""
        return tuple(dict.fromkeys(s.split for s in self.samples))

    @property
    def reading(self) -> Reading:
        """How the pixels of all samples become 8-bit RGB."""
        return self.samples[0].reading if self.samples else Reading()

    def read_as(self, reading: Reading) -> Collection:
        """The same collection with its images read in this way."""
        if reading == self.reading:
            return self
        return replace(self, samples=tuple(replace(s, reading=reading) for s in self.samples))

    def with_binary_masks(self) -> Collection:
        """The same collection whose masks show one object in white.

        That is the only class there is, or else the only tag of the image. White pixels of an
        image with several tags, or with none, are unsure (255), and left out of the evaluation.
        """
        number = {name: i for i, name in enumerate(self.classes, start=1)}

        def meant(tags: tuple[str, ...] | None) -> int:
            names = self.classes if len(self.classes) == 1 else tuple(dict.fromkeys(tags or ()))
            return number.get(names[0], 255) if len(names) == 1 else 255

        samples = tuple(
            s if s.mask is None else replace(s, mask_id=meant(s.tags)) for s in self.samples
        )
        there = [s for s in samples if s.mask_id is not None]
        unsure = sum(s.mask_id == 255 for s in there)
        note = (
            f"White in the {len(there):,} ground-truth masks is the image's class "
            "(data.masks_are: binary)"
        )
        note += (
            f"; in {unsure:,} of them it is unsure, as the image has several tags or none."
            if unsure
            else "."
        )
        return replace(self, samples=samples, notes=(*self.notes, note))

    def split(self, *names: str) -> Collection:
        """The samples of the named splits."""
        return replace(self, samples=tuple(s for s in self.samples if s.split in names))

    def only(self, ids: Iterable[str]) -> Collection:
        """The samples with these ids, in the collection's order.

        Raises:
            UserError: An id is not in the collection.
        """
        wanted = set(ids)
        unknown = wanted - {s.id for s in self.samples}
        if unknown:
            raise UserError(
                f"{len(unknown)} ids of the list are not in the collection, such as "
                f"{sorted(unknown)[0]!r}",
                where=self.name,
                mend="list ids as paths relative to the image folder, without suffix",
            )
        return replace(self, samples=tuple(s for s in self.samples if s.id in wanted))

    def tag_matrix(self) -> np.ndarray:
        """(N, K) uint8; 1 where the class is tagged. Untagged samples are rows of zeros."""
        column = {name: k for k, name in enumerate(self.classes)}
        matrix = np.zeros((len(self.samples), len(self.classes)), dtype=np.uint8)
        for row, sample in enumerate(self.samples):
            for tag in sample.tags or ():
                matrix[row, column[tag]] = 1
        return matrix

    def fingerprint(self) -> str:
        """Hash of ids, tags, splits, classes, what the image files hold, and how they are read.

        Where the files lie and when they were written does not matter. Ground-truth masks are left
        out: they must not change what is trained.
        """
        contents = digests([s.image for s in self.samples])
        parts = (
            (repr((s.id, s.tags, s.split)), content)
            for s, content in zip(self.samples, contents, strict=True)
        )
        read = self.reading.decides()
        head = ("\0".join(self.classes), repr(read) if read else None)
        return together([head, *parts])


def lot(sample_id: str) -> str:
    """A fixed lot, to draw a few images by: sort by it and take the first."""
    return hashlib.sha256(sample_id.encode("utf-8", "surrogateescape")).hexdigest()
