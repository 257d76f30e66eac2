"""Images side by side with everything that a run made of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from weakseg.data.samples import Sample
from weakseg.report.facts import Facts
from weakseg.report.pictures import (
    Picture,
    choose,
    heat_map,
    mask_picture,
    overlay,
    photo,
    thumbnail,
    truth_picture,
)

__all__ = ["COLUMNS", "PictureGrid", "PictureRow", "grid", "picture_row", "pictures_of", "shown"]

COLUMNS = {
    "image": "image",
    "scores": "scores",
    "refined": "refined scores",
    "mask": "mask",
    "overlay": "overlay",
    "prediction": "prediction",
    "truth": "ground truth",
}
"""What there may be of an image, in order, with its title."""


@dataclass(frozen=True)
class PictureRow:
    """One image with everything that was made of it."""

    id: str
    tags: Sequence[str]
    cells: dict[str, Picture | None] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class PictureGrid:
    """Rows that share their columns."""

    columns: list[str]
    rows: list[PictureRow]


def grid(rows: list[PictureRow]) -> PictureGrid | None:
    """Leaves out columns that no row has; ``None`` where there is no row."""
    if not rows:
        return None
    used = [key for key in COLUMNS if any(row.cells.get(key) for row in rows)]
    return PictureGrid(used, rows)


def shown(facts: Facts, count: int) -> list[Sample]:
    """Training images to show: of those that have a mask, where there are some."""
    samples = facts.train_samples
    masks = facts.run.stage_folder("masks") / "masks"
    made = [s for s in samples if os.path.isfile(masks / f"{s.id}.png")]  # whatever the name
    return choose(made or samples, facts.collection.classes, count)


def picture_row(facts: Facts, sample: Sample, columns: Sequence[str], note: str = "") -> PictureRow:
    """One image with these of :data:`COLUMNS`; without any where it cannot be read."""
    rgb = thumbnail(sample)
    cells = {} if rgb is None else pictures_of(facts, sample, rgb, columns)
    return PictureRow(sample.id, sample.tags or (), cells, note)


def pictures_of(
    facts: Facts, sample: Sample, rgb: np.ndarray, columns: Sequence[str]
) -> dict[str, Picture | None]:
    """The pictures of one image that these columns show.

    Args:
        facts: Of the run that made them.
        sample: The image.
        rgb: Its thumbnail.
        columns: Keys of :data:`COLUMNS`.
    """
    size = (rgb.shape[0], rgb.shape[1])
    folder = facts.run.stage_folder
    mask = folder("masks") / "masks" / f"{sample.id}.png"
    prediction = folder("predict") / "masks" / f"{sample.id}.png"
    scores = facts.run.scores_folder() / f"{sample.id}.npz"
    refined = facts.run.scores_folder(facts.recipe.steps) / f"{sample.id}.npz"
    threshold = facts.threshold.value if facts.threshold is not None else None
    makers = {
        "image": lambda: photo(rgb),
        "scores": lambda: heat_map(rgb, scores, threshold if refined == scores else None),
        "refined": lambda: None if refined == scores else heat_map(rgb, refined, threshold),
        "mask": lambda: mask_picture(mask, size),
        "overlay": lambda: overlay(rgb, mask),
        "prediction": lambda: mask_picture(prediction, size),
        "truth": lambda: truth_picture(sample, size),
    }
    return {key: makers[key]() for key in columns}
