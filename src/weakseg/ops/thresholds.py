"""Background thresholds from score maps alone: no ground truth is involved.

Most criteria look at one histogram: how many pixels have which best foreground score. Pixels without
any evidence (scores of zero) take no part, unless it says otherwise: where there is no evidence
there is nothing to split. One looks at the images' colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

__all__ = [
    "CRITERIA",
    "Criterion",
    "ThresholdCurve",
    "colour_contrast",
    "contrast_threshold",
    "label_free_threshold",
]

Criterion = Literal["cross-entropy", "expected-iou", "evidence", "variance"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)

_STEPS = 100  # of thresholds, where colours are compared
_LEAST, _MOST = 0.05, 0.75  # the lowest and the highest of them


@dataclass(frozen=True)
class ThresholdCurve:
    """A threshold and the criterion that chose it.

    Attributes:
        threshold: Where the criterion is smallest, in (0, 1).
        thresholds: (T,) thresholds that were compared.
        values: (T,) criterion at each of them.
    """

    threshold: float
    thresholds: np.ndarray
    values: np.ndarray


def label_free_threshold(
    histogram: np.ndarray, criterion: Criterion = "cross-entropy"
) -> ThresholdCurve | None:
    """The threshold at which a criterion of the scores' histogram is smallest.

    With x the scores above zero, split by t into a lower part of n0 pixels with mean m0 and an
    upper part of n1 with mean m1:

    ``cross-entropy`` (Li & Lee 1993)
        ``- n0 m0 log m0 - n1 m1 log m1``, of the scores with their two-level version. Scores of a
        network that was trained on tags fall off slowly from the telling part of an object to its
        rim; this weighs small scores more than ``variance`` does, and keeps the rim.
    ``variance`` (Otsu 1979)
        ``- n0 n1 (m1 - m0)^2 / (n0 + n1)^2``: splits at half height, which suits flat maps.
    ``expected-iou``
        ``- n1 m1 / (n1 + n0 m0)``: minus the intersection over union that is to be expected if a
        score is taken for the probability that its pixel is foreground.
    ``evidence``
        ``|t - sqrt(m m')|``, m the mean of the scores above zero and m' that of all: the more of
        the images shows nothing at all, the less is asked of what shows something.

    ``docs/thresholds.md`` compares them.

    Args:
        histogram: (N,) counts of the best foreground score of every pixel, N even bins over [0, 1].
        criterion: One of the above.

    Returns:
        The threshold with its curve; ``None`` where fewer than two bins above zero are filled.
    """
    counts = np.array(histogram, dtype=np.float64)
    zeros, counts[0] = counts[0], 0
    filled = np.flatnonzero(counts)
    if len(filled) < 2:
        return None
    scores = (np.arange(len(counts)) + 0.5) / len(counts)
    # Each cut is the last bin of the lower part; both parts hold pixels.
    cuts = np.arange(filled[0], filled[-1])
    weight, mass = counts.cumsum(), (counts * scores).cumsum()
    low = _Part(weight[cuts], mass[cuts])
    high = _Part(weight[-1] - low.weight, mass[-1] - low.mass)
    thresholds = (cuts + 1) / len(counts)
    values = _VALUES[criterion](low, high, thresholds, zeros)
    return ThresholdCurve(float(thresholds[values.argmin()]), thresholds, values)


def colour_contrast(image: np.ndarray, best: np.ndarray) -> np.ndarray:
    """(100,) share of the variance of an image's colours that lies between the two sides.

    With w the share of pixels whose score is above a threshold, m1 and m0 the mean colours (CIE Lab)
    above and below it, and v the sum of the channels' variances: ``w (1 - w) |m1 - m0|^2 / v``, for
    thresholds in steps of .01. Zero where one side is empty, and for an image of one colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        best: (H, W) best foreground score, in [0, 1].
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    steps = np.minimum((best * _STEPS).astype(np.int64), _STEPS - 1).ravel()
    # Sums of what lies below each threshold; below the first there is nothing.
    below = np.concatenate([[0], np.bincount(steps, minlength=_STEPS).cumsum()[:-1]]) / steps.size
    sums = np.stack([np.bincount(steps, c, _STEPS).cumsum() for c in lab.T], 1) / steps.size
    mean, sums = sums[-1], np.concatenate([np.zeros((1, 3)), sums[:-1]])
    sides = below * (1 - below)
    with np.errstate(all="ignore"):
        between = ((sums - below[:, None] * mean) ** 2).sum(1) / sides
    share = between / max(float(lab.var(0).sum()), 1e-6)
    return np.where(sides > 0, np.nan_to_num(share, posinf=0, neginf=0), 0.0)


def contrast_threshold(contrast: np.ndarray) -> ThresholdCurve | None:
    """The threshold of the largest mean :func:`colour_contrast` of all images.

    Args:
        contrast: (100,) sum or mean over images.

    Returns:
        The threshold, between .05 and .75, with its curve (negative); ``None`` without contrast.
    """
    thresholds = np.arange(_STEPS) / _STEPS
    inside = (thresholds >= _LEAST) & (thresholds < _MOST)
    values = -contrast[inside]
    if not values.min() < 0:
        return None
    return ThresholdCurve(float(thresholds[inside][values.argmin()]), thresholds[inside], values)


@dataclass(frozen=True)
class _Part:
    """The pixels on one side of each cut: how many, and the sum of their scores; both (T,)."""

    weight: np.ndarray
    mass: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.mass / self.weight


def _cross_entropy(low: _Part, high: _Part, thresholds: np.ndarray, zeros: float) -> np.ndarray:
    total = low.mass + high.mass
    return -(low.mass * np.log(low.mean) + high.mass * np.log(high.mean)) / total


def _variance(low: _Part, high: _Part, thresholds: np.ndarray, zeros: float) -> np.ndarray:
    total = low.weight + high.weight
    return -low.weight * high.weight * (high.mean - low.mean) ** 2 / total**2


def _expected_iou(low: _Part, high: _Part, thresholds: np.ndarray, zeros: float) -> np.ndarray:
    return -high.mass / (high.weight + low.mass)


def _evidence(low: _Part, high: _Part, thresholds: np.ndarray, zeros: float) -> np.ndarray:
    mass, weight = low.mass + high.mass, low.weight + high.weight
    return np.abs(thresholds - mass / np.sqrt(weight * (weight + zeros)))


_VALUES: dict[Criterion, Callable[[_Part, _Part, np.ndarray, float], np.ndarray]] = {
    "cross-entropy": _cross_entropy,
    "expected-iou": _expected_iou,
    "evidence": _evidence,
    "variance": _variance,
}
