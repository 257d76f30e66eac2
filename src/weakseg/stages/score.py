"""Sorts masks by how good they probably are, without ground truth: the worst come first."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
from rich.markup import escape

from weakseg.console import console, track
from weakseg.csvfile import write_csv
from weakseg.data.images import image_size, read_mask, same_shape
from weakseg.data.samples import IMAGE_SUFFIXES, Sample
from weakseg.data.sources import is_background, sample_id, scan
from weakseg.data.survey import find_reading
from weakseg.errors import UserError
from weakseg.ops import MaskQuality, mask_quality

__all__ = [
    "Masked",
    "Scored",
    "class_names",
    "match",
    "score_masks",
    "write_quality",
]

_SIDE = 256  # images are reduced to this longer side: the estimate needs no more


@dataclass(frozen=True)
class Masked:
    """An image and its mask."""

    sample: Sample
    mask: Path

    @property
    def id(self) -> str:
        """Id of the image."""
        return self.sample.id


@dataclass(frozen=True)
class Scored:
    """A mask with its estimate."""

    masked: Masked
    quality: MaskQuality


def match(masks: Path, images: Path) -> list[Masked]:
    """The masks of a folder with their images: ``MASKS/<id>.png`` and ``IMAGES/<id>.jpg``.

    Images without a mask are left out.

    Raises:
        UserError: A folder is missing, no mask was found, or a mask has no image.
    """
    for folder in (masks, images):
        if not folder.is_dir():
            raise UserError(
                "is no folder", where=folder, mend="give a folder of masks, then images"
            )
    found = [name for name in scan(masks) if name.lower().endswith(".png")]
    if not found:
        raise UserError("holds no masks (.png)", where=masks, mend="give the folder of the masks")
    by_id = {sample_id(name): images / name for name in scan(images)}
    wanting = [name for name in found if sample_id(name) not in by_id]
    if wanting:
        raise UserError(
            f"{len(wanting)} of {len(found)} masks have no image, such as {wanting[0]!r}",
            where=images,
            mend="name masks after their images, in the same sub-folders "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})",
        )
    samples = [Sample(sample_id(n), by_id[sample_id(n)], None) for n in found]
    reading, notes = find_reading(samples)
    for note in notes:
        console.print(f"  [dim]{escape(note)}[/dim]")
    return [
        Masked(replace(s, reading=reading), masks / n) for s, n in zip(samples, found, strict=True)
    ]


def class_names(masks: Path) -> tuple[str, ...]:
    """Names of the ids 1..K from a ``classes.txt`` in the folder or beside it, if there is one.

    A leading ``background`` is left out. They name classes on a page, so any text will do.
    """
    for file in (masks / "classes.txt", masks.parent / "classes.txt"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            return tuple(names[1:] if names and is_background(names[0]) else names)
    return ()


def score_masks(masked: Sequence[Masked]) -> list[Scored]:
    """Estimates all masks; the worst first, equal ones by id.

    Raises:
        UserError: An image or a mask cannot be read, or they differ in shape.
    """

    def one(pair: Masked) -> Scored:
        image, mask = pair.sample.pixels(_SIDE), read_mask(pair.mask)
        height, width = image_size(pair.sample.image)
        if not same_shape((mask.shape[0], mask.shape[1]), (height, width)):
            raise UserError(
                f"the mask is {mask.shape[1]} x {mask.shape[0]}, another shape than its image of "
                f"{width} x {height}",
                where=pair.mask,
                mend="give each image the mask of its own size",
            )
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        return Scored(pair, mask_quality(image, mask))

    with ThreadPoolExecutor() as pool:
        found = list(track(pool.map(one, masked), "quality", len(masked)))
    return sorted(found, key=lambda s: (s.quality.score, s.masked.id))


def write_quality(path: Path, scored: Sequence[Scored]) -> None:
    """Writes the estimates as CSV, in their order."""
    rows = (
        {
            "id": item.masked.id,
            "score": f"{item.quality.score:.4f}",
            "agreement": f"{item.quality.agreement:.4f}",
            "border": f"{item.quality.border:.4f}",
            "classes": item.quality.classes,
            "foreground": f"{item.quality.foreground:.4f}",
        }
        for item in scored
    )
    write_csv(path, ("id", "score", "agreement", "border", "classes", "foreground"), rows)
