"""Figures of the docs: columns of small pictures with a name above each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from weakseg.data.images import read_image, read_mask, voc_palette
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.recipe import MasksConfig
from weakseg.stages.masks import choose_rule, label
from weakseg.stages.seeds import scores_path

__all__ = ["draw", "image_cell", "mask_cell", "scores_cells"]

SIDE = 128


def image_cell(sample: Sample) -> np.ndarray:
    """The image, (SIDE, SIDE, 3) uint8."""
    return cv2.resize(read_image(sample.image), (SIDE, SIDE))


def scores_cells(folder: Path, images: Collection, samples: Sequence[Sample]) -> list[np.ndarray]:
    """The best scores as heat maps over the dimmed images, label-free foreground outlined."""
    threshold = choose_rule(MasksConfig(), folder, images).threshold
    return [_scores_cell(folder, sample, threshold) for sample in samples]


def mask_cell(path: Path) -> np.ndarray:
    """A mask in VOC's colours."""
    colours = voc_palette()[read_mask(path)]
    return cv2.resize(colours, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)


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
    cv2.imwrite(str(path), canvas[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


def _scores_cell(folder: Path, sample: Sample, threshold: float | None) -> np.ndarray:
    seed = read_scores(scores_path(folder, sample.id))
    best, _ = seed.full_size().best()
    heat = cv2.applyColorMap(np.rint(best * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    gray = cv2.cvtColor(
        cv2.cvtColor(read_image(sample.image), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB
    )
    picture = np.ascontiguousarray(cv2.addWeighted(heat, 0.8, gray, 0.25, 0))
    foreground = (label(seed, threshold) > 0).astype(np.uint8)
    edges, _ = cv2.findContours(foreground, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.resize(cv2.drawContours(picture, edges, -1, (255, 255, 255), 1), (SIDE, SIDE))
