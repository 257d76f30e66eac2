"""Background thresholds from images and tags alone."""

from __future__ import annotations

import numpy as np

__all__ = ["label_free_threshold"]


def label_free_threshold(histogram: np.ndarray) -> float:
    """Otsu (temporary, being compared)."""
    p = histogram / histogram.sum()
    x = (np.arange(len(p)) + 0.5) / len(p)
    w = p.cumsum()
    m = (p * x).cumsum()
    total = m[-1]
    with np.errstate(all="ignore"):
        between = (total * w - m) ** 2 / (w * (1 - w))
    return float(x[np.nanargmax(between[:-1])])
