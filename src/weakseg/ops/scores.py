"""Score maps: normalisation, tag gating, merging of scales and flips, background scores.

All of it is computed in float32, also under autocast: a half-precision maximum plus 1e-5 loses
the constant that keeps an empty map empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

__all__ = [
    "MapKind",
    "add_background",
    "gate",
    "merge_maps",
    "normalise_max",
    "normalise_min_max",
    "power_threshold",
]

MapKind = Literal["logit", "unit", "probability"]
"""How the maps of scales and flips merge: see :func:`merge_maps`."""

_EPS = 1e-5


def normalise_max(scores: Tensor) -> Tensor:
    """Clamps at zero and divides each map by its spatial maximum plus 1e-5.

    Args:
        scores: (..., h, w).

    Returns:
        (..., h, w) float32 in [0, 1); a map without positive values becomes zeros.
    """
    positive = scores.float().relu()
    return positive / (positive.amax((-2, -1), keepdim=True) + _EPS)


def normalise_min_max(scores: Tensor) -> Tensor:
    """Maps each map's range to [0, 1]; a constant map becomes zeros."""
    scores = scores.float()
    low = scores.amin((-2, -1), keepdim=True)
    return (scores - low) / (scores.amax((-2, -1), keepdim=True) - low + _EPS)


def gate(scores: Tensor, tags: Tensor) -> Tensor:
    """Sets the maps of absent classes to zero.

    Args:
        scores: (B, K, h, w).
        tags: (B, K), 1 where the class is present.
    """
    return scores * tags.to(scores.dtype)[..., None, None]


def merge_maps(maps: Sequence[Tensor], kind: MapKind) -> Tensor:
    """Merges the maps of several scales and flips, all brought to one size and orientation.

    Args:
        maps: Each (B, K, h, w).
        kind: ``logit``: sum of the positive parts, then maximum-normalised; ``unit``: the same sum,
            then min-max; ``probability``: mean.

    Returns:
        (B, K, h, w) float32 in [0, 1].
    """
    if kind == "probability":
        return torch.stack([m.float() for m in maps]).mean(0)
    total = torch.stack([m.float().relu() for m in maps]).sum(0)
    return normalise_max(total) if kind == "logit" else normalise_min_max(total)


def add_background(
    scores: Tensor, *, threshold: float | None = None, alpha: float | None = None
) -> Tensor:
    """Puts a background score before the class scores.

    Args:
        scores: (B, K, h, w) in [0, 1].
        threshold: Constant background score.
        alpha: Power rule: background is (1 - max over classes)^alpha; exactly one is given.

    Returns:
        (B, K + 1, h, w), background first.
    """
    if (threshold is None) == (alpha is None):
        raise ValueError("give either threshold or alpha")
    scores = scores.float()
    if alpha is None:
        background = torch.full_like(scores[:, :1], threshold)  # type: ignore[arg-type]
    else:
        background = (1 - scores.amax(1, keepdim=True)).clamp(min=0) ** alpha
    return torch.cat([background, scores], 1)


def power_threshold(alpha: float) -> float:
    """The constant threshold that labels every pixel as the power rule with ``alpha`` does.

    A pixel is foreground where its best score m exceeds (1 - m)^alpha, which grows as m falls: so
    m must exceed the one t with t = (1 - t)^alpha.
    """
    return float(brentq(lambda t: t - (1 - t) ** alpha, 0.0, 1.0))
