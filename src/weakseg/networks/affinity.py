"""Networks that say which neighbouring pixels belong together: IRNet's edge branch and AffinityNet.

Both read the levels of any backbone. The edge branch (Ahn et al., Weakly Supervised Learning of
Instance Segmentation with Inter-pixel Relations, CVPR 2019) gives one logit of a class boundary at
each cell; its displacement branch, which serves instance masks alone, is left out. AffinityNet
(Ahn and Kwak, Learning Pixel-level Semantic Affinity, CVPR 2018) gives a feature at each cell,
whose distances are affinities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.networks.backbone import Backbone, Level

__all__ = ["AffinityNetwork", "EdgeBranch", "FeatureBranch"]


class EdgeBranch(nn.Module):
    """Boundary logits from all levels (IRNet, fig. 3): 1 x 1 to 32 channels each, joined.

    Args:
        levels: Levels of the backbone.
    """

    stride = 4

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        width = 32
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(level.channels, width, 1, bias=False), nn.GroupNorm(4, width))
            for level in levels
        )
        self.join = nn.Conv2d(width * len(levels), 1, 1)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, 1, h, w) logits at ``size``."""
        return self.join(
            torch.cat(
                [_to(r(f), size).relu() for r, f in zip(self.reduce, features, strict=True)], 1
            )
        )


class FeatureBranch(nn.Module):
    """Features whose distances are affinities, from the last three levels (AffinityNet, sec. 3.2).

    Args:
        levels: Levels of the backbone.
    """

    stride = 8

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        widths = (64, 128, 256)
        self.reduce = nn.ModuleList(
            nn.Conv2d(level.channels, width, 1, bias=False)
            for level, width in zip(levels[-3:], widths, strict=True)
        )
        self.join = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(B, 448, h, w) features at ``size``."""
        joined = torch.cat(
            [_to(F.elu(r(f)), size) for r, f in zip(self.reduce, features[-3:], strict=True)], 1
        )
        return F.elu(self.join(joined))


class AffinityNetwork(nn.Module):
    """A backbone with one of the two branches.

    Attributes:
        stride: Pixels in one cell of the output.

    Args:
        backbone: Any backbone.
        kind: ``irn``: boundary logits at stride 4; ``psa``: features at stride 8.
        train_backbone: Whether gradients reach the backbone (psa) or its features are fixed (irn).
    """

    def __init__(
        self, backbone: Backbone, kind: Literal["irn", "psa"], train_backbone: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        branch = EdgeBranch if kind == "irn" else FeatureBranch
        self.branch = branch(backbone.levels)
        self.stride = branch.stride
        self.train_backbone = train_backbone
        if not train_backbone:  # the other way would thaw what the backbone itself keeps fixed
            self.backbone.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> AffinityNetwork:
        """Sets the mode; a fixed backbone keeps its statistics."""
        super().train(mode)
        if not self.train_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Boundary logits (B, 1, h, w) or features (B, 448, h, w) of normalised images."""
        size = (-(-images.shape[-2] // self.stride), -(-images.shape[-1] // self.stride))
        with torch.set_grad_enabled(self.train_backbone and torch.is_grad_enabled()):
            features = self.backbone(images)
        return self.branch(features, size)


def _to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
