"""Training of an affinity network on pairs of pixels whose labels are sure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.data.loading import MaskBatch
from weakseg.methods.base import Maps, Phase, Trainable
from weakseg.networks.affinity import AffinityNetwork, EdgeBranch
from weakseg.networks.backbone import Backbone
from weakseg.ops.confusion import IGNORE
from weakseg.ops.random_walk import edge_affinity, feature_affinity, half_disc

__all__ = ["AffinityLearner", "pair_losses"]

_EPS = 1e-5
_SHARE = {"background": 0.25, "foreground": 0.25, "different": 0.5}


class AffinityLearner(Trainable):
    """An affinity network with the loss that psa and irn share, :func:`pair_losses`.

    Args:
        network: The network.
        radius: Pairs closer than this, in cells, are compared.
        pairs: ``inner``, as published, or ``all``; see :func:`pair_losses`.
    """

    heads = ("affinity",)
    terms = tuple(_SHARE)

    def __init__(
        self, network: AffinityNetwork, radius: int, pairs: Literal["inner", "all"] = "inner"
    ) -> None:
        super().__init__()
        self.network = network
        self.radius = radius
        self.pairs = pairs

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The network's backbone."""
        return self.network.backbone

    def phases(self) -> dict[str, Phase]:
        """One phase, which leaves a fixed backbone alone."""
        return {"main": Phase(self.losses, self._trained, self.terms)}

    def losses(self, batch: MaskBatch, progress: float) -> dict[str, Tensor]:
        """Cross-entropy of pairs; a kind of pair that the batch does not hold is left out."""
        predicted = self.network(batch.images).float()
        size = (predicted.shape[-2], predicted.shape[-1])
        labels = F.interpolate(batch.masks[:, None].float(), size, mode="nearest-exact")[:, 0]
        if isinstance(self.network.branch, EdgeBranch):
            affinity = edge_affinity(predicted.sigmoid(), self.radius)
        else:
            affinity = feature_affinity(predicted, self.radius)
        return pair_losses(affinity, labels.to(torch.uint8), self.radius, self.pairs)

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """Boundary probabilities (B, 1, h, w), or features (B, 448, h, w), in ``scores``."""
        predicted = self.network(images).float()
        if isinstance(self.network.branch, EdgeBranch):
            predicted = predicted.sigmoid()
        return Maps(predicted, kind="probability")

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self.parameters() if p.requires_grad)


def pair_losses(
    affinity: Tensor, labels: Tensor, radius: int, pairs: Literal["inner", "all"] = "inner"
) -> dict[str, Tensor]:
    """Weighted cross-entropy of pairs: both background, both of one class, or different.

    A pair starts at its upper cell, in one row at its left one. psa and irn train on pairs that
    start at least radius - 1 cells away from the left, the right and the lower border (``inner``),
    for which every neighbour lies inside: of a grid of 128 x 128 cells and radius 10, 85 % of all
    pairs.

    Args:
        affinity: (B, P, h, w) in [0, 1] of each cell with its P neighbours of ``half_disc(radius)``.
        labels: (B, h, w) uint8, 0 = background; pairs with a 255 are ignored.
        radius: Of the pairs, in cells.
        pairs: Those away from the borders (``inner``), or ``all`` that lie inside the image.

    Returns:
        The mean over the pairs of each kind, times 1/4, 1/4 and 1/2; kinds without pairs are left
        out.
    """
    other, own = _neighbours(labels, radius), labels[:, None]
    if pairs == "inner":
        affinity, other, own = (_inner(maps, radius - 1) for maps in (affinity, other, own))
    sure = (own != IGNORE) & (other != IGNORE)
    same = sure & (own == other)
    kinds = {
        "background": same & (own == 0),
        "foreground": same & (own != 0),
        "different": sure & (own != other),
    }
    terms = {}
    for name, chosen in kinds.items():
        picked = affinity[chosen]
        if len(picked):
            right = 1 - picked if name == "different" else picked
            terms[name] = -_SHARE[name] * (right + _EPS).log().mean()
    return terms


def _inner(maps: Tensor, reach: int) -> Tensor:
    """Maps (..., h, w) of the cells whose neighbours down and to both sides lie inside."""
    height, width = maps.shape[-2:]
    return maps[..., : max(height - reach, 0), reach : max(width - reach, reach)]


def _neighbours(labels: Tensor, radius: int) -> Tensor:
    """(B, P, h, w) labels of the neighbours; 255 outside the image."""
    height, width = labels.shape[-2:]
    padded = F.pad(labels, (radius, radius, 0, radius), value=IGNORE)
    return torch.stack(
        [
            padded[:, dy : dy + height, radius + dx : radius + dx + width]
            for dy, dx in half_disc(radius)
        ],
        1,
    )
