"""Background thresholds from score maps alone: no ground truth is involved.

Most criteria look at one histogram: how many pixels have which best foreground score. Pixels without
any evidence (scores of zero) take no part, unless it says otherwise: where there is no evidence
there is nothing to split. One looks at maps of the same images at two scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

__all__ = [
    "CRITERIA",
    "Criterion",
    "ThresholdCurve",
    "agreement_threshold",
    "label_free_threshold",
]

Criterion = Literal["cross-entropy", "expected-iou", "evidence", "variance"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


_LEAST, _MOST = 0.05, 0.75  # thresholds between which two scales are compared


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


def agreement_threshold(joint: np.ndarray) -> ThresholdCurve | None:
    """The threshold at which the foregrounds of two scales agree best, beyond chance.

    At a threshold let a be the foreground's share of all pixels (the mean of both scales) and IoU
    that of the two foregrounds, over all images together. Two unrelated foregrounds of that share
    have ``chance = a / (2 - a)``; the criterion is ``-(IoU - chance) / (1 - chance)``. Maps of a
    network that knows whole objects agree up to high thresholds; where only the most telling part
    lights up, scales agree in the pale rest alone, and the threshold falls.

    Args:
        joint: (T, T) counts of pixels by best score at one scale (rows) and at another, T even bins
            over [0, 1].

    Returns:
        The threshold with its curve; ``None`` where there is no foreground at any threshold.
    """
    both = np.asarray(joint, np.float64) + np.asarray(joint, np.float64).T
    above = both[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1].diagonal()
    one = both.sum(1)[::-1].cumsum()[::-1]
    thresholds = np.arange(len(both)) / len(both)
    inside = np.flatnonzero((thresholds >= _LEAST) & (thresholds < _MOST) & (one > 0))
    if not len(inside) or one[inside[0]] == both.sum():
        return None
    share = one[inside] / both.sum()
    iou = above[inside] / (2 * one[inside] - above[inside])
    chance = share / (2 - share)
    values = -(iou - chance) / np.maximum(1 - chance, 1e-9)
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
