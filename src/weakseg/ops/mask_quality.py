"""How good a mask probably is, from the mask and its image alone: no ground truth is involved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from weakseg.ops.confusion import IGNORE
from weakseg.ops.dense_crf import dense_crf_from_labels

__all__ = ["MaskQuality", "mask_agreement", "mask_quality"]

_TRUST = 0.7  # of the CRF in the mask's labels
_RIM = 0.012  # of the longer side: width of the border that is looked at


@dataclass(frozen=True)
class MaskQuality:
    """An estimate, and what it was made of; shares in [0, 1].

    Attributes:
        score: ``agreement * (1 - border) / sqrt(classes)``; for sorting, not an IoU.
        agreement: Mean IoU of the mask with its dense CRF, which follows the image's colours: low
            where the outline runs past the object's, or through it.
        border: Share of the image's border that is foreground: objects seldom fill it, what has
            spilled over often does.
        classes: Foreground classes in the mask; with several of them there is more to confuse.
        foreground: Share of the image that is foreground.
    """

    score: float
    agreement: float
    border: float
    classes: int
    foreground: float


def mask_quality(image: np.ndarray, mask: np.ndarray, iterations: int = 5) -> MaskQuality:
    """Estimates a mask's quality for sorting: worst first, to be corrected first.

    A mask without any foreground gets a score of 0: an image that is looked at has tags. Measured
    against true IoU in ``docs/thresholds.md``.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 0 background, 255 unsure.
        iterations: Mean-field steps of the CRF.

    Raises:
        ValueError: The mask has another size than the image.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask is {mask.shape}, the image {image.shape[:2]}")
    present = [int(c) for c in np.unique(mask) if c != IGNORE]
    foreground = (mask != 0) & (mask != IGNORE)
    share = float(foreground.mean())
    classes = sum(c != 0 for c in present)
    if not classes:
        return MaskQuality(0.0, 0.0, 0.0, 0, share)
    border = float(foreground[_rim(mask.shape)].mean())
    labels = np.full(mask.shape, IGNORE, np.int64)
    for place, c in enumerate(present):
        labels[mask == c] = place
    agreement = 1.0
    if len(present) > 1:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        refined = dense_crf_from_labels(
            pixels, torch.from_numpy(labels)[None], len(present), _TRUST, iterations
        )
        agreement = mask_agreement(labels.astype(np.uint8), refined[0].argmax(0).numpy())
    score = agreement * (1 - border) / np.sqrt(classes)
    return MaskQuality(float(score), agreement, border, classes, share)


def mask_agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Mean IoU of two masks over all ids that either holds; pixels unsure in the first are left out."""
    known = one != IGNORE
    one, other = one[known], other[known]
    found = []
    for c in np.union1d(one, other):
        a, b = one == c, other == c
        found.append((a & b).sum() / (a | b).sum())
    return float(np.mean(found)) if found else 1.0


def _rim(size: tuple[int, ...]) -> np.ndarray:
    wide = max(1, round(_RIM * max(size)))
    rim = np.ones(size, bool)
    rim[wide:-wide, wide:-wide] = False
    return rim
