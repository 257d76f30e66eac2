"""Figures of the docs: columns of small pictures with a name above each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from weakseg.data.images import read_image, read_mask, voc_palette
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.recipe import MasksConfig
from weakseg.stages.masks import choose_rule, label
from weakseg.stages.seeds import scores_path

__all__ = [
    "SIDE",
    "class_cells",
    "draw",
    "image_cell",
    "mask_cell",
    "masks_cells",
    "scores_cells",
]

SIDE = 128


def image_cell(sample: Sample) -> np.ndarray:
    """The image, (SIDE, SIDE, 3) uint8."""
    return cv2.resize(read_image(sample.image), (SIDE, SIDE))


def scores_cells(folder: Path, images: Collection, samples: Sequence[Sample]) -> list[np.ndarray]:
    """The best scores as heat maps over the dimmed images, label-free foreground outlined."""
    threshold = choose_rule(MasksConfig(), folder, images).threshold
    return [_scores_cell(folder, sample, threshold) for sample in samples]


def class_cells(folder: Path, samples: Sequence[Sample], index: int) -> list[np.ndarray]:
    """The scores of one class of each image, blank where it has no more classes than that."""
    cells = []
    for sample in samples:
        maps = read_scores(scores_path(folder, sample.id)).full_size().foreground()[1]
        blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
        cells.append(_heat(maps[index], sample) if index < len(maps) else blank)
    return cells


def masks_cells(folder: Path, images: Collection, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Masks that follow from scores by the label-free threshold."""
    threshold = choose_rule(MasksConfig(), folder, images).threshold
    return [_coloured(label(read_scores(scores_path(folder, s.id)), threshold)) for s in samples]


def mask_cell(path: Path) -> np.ndarray:
    """A mask in VOC's colours."""
    return _coloured(read_mask(path))


def draw(columns: dict[str, list[np.ndarray]], path: Path) -> None:
    """Writes the columns side by side."""
    gap, head = 6, 22
    rows = max(map(len, columns.values()))
    canvas = np.full(
        (head + rows * (SIDE + gap), len(columns) * (SIDE + gap) - gap, 3), 255, np.uint8
    )
    for x, (name, cells) in enumerate(columns.items()):
        left = x * (SIDE + gap)
        cv2.putText(
            canvas, name, (left + 2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40,) * 3, 1, cv2.LINE_AA
        )
        for y, cell in enumerate(cells):
            top = head + y * (SIDE + gap)
            canvas[top : top + SIDE, left : left + SIDE] = cell
    path.parent.mkdir(parents=True, exist_ok=True)
    # So many colours are enough, in a third of the bytes.
    Image.fromarray(canvas).quantize(160, kmeans=1).save(path, optimize=True)


def _coloured(mask: np.ndarray) -> np.ndarray:
    return cv2.resize(voc_palette()[mask], (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)


def _heat(scores: np.ndarray, sample: Sample) -> np.ndarray:
    """Scores in [0, 1] as a heat map over the dimmed image."""
    heat = cv2.applyColorMap(np.rint(scores * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    gray = cv2.cvtColor(read_image(sample.image), cv2.COLOR_RGB2GRAY)
    dimmed = cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
    picture = np.ascontiguousarray(cv2.addWeighted(heat[..., ::-1], 0.8, dimmed, 0.25, 0))
    return cv2.resize(picture, (SIDE, SIDE))


def _scores_cell(folder: Path, sample: Sample, threshold: float | None) -> np.ndarray:
    seed = read_scores(scores_path(folder, sample.id))
    picture = _heat(seed.full_size().best()[0], sample)
    foreground = (label(seed, threshold) > 0).astype(np.uint8)
    foreground = cv2.resize(foreground, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    edges, _ = cv2.findContours(foreground, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(picture, edges, -1, (255, 255, 255), 1)
