"""Networks that say which neighbouring pixels belong together: IRNet's edge branch and AffinityNet.

Both read the levels of any backbone. The edge branch (Ahn et al., Weakly Supervised Learning of
Instance Segmentation with Inter-pixel Relations, CVPR 2019) gives one logit of a class boundary at
each cell; its displacement branch, which serves instance masks alone, is left out. AffinityNet
(Ahn and Kwak, Learning Pixel-level Semantic Affinity, CVPR 2018) gives a feature at each cell,
whose distances are affinities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.networks.backbone import Backbone, Level
from weakseg.ops import place

__all__ = ["STRIDES", "AffinityNetwork", "EdgeBranch", "FeatureBranch"]

STRIDES = {"irn": 4, "psa": 8}
"""Pixels in one cell of the output, by kind."""

Placing = Literal["cells", "crop"]
_ToGrid = Callable[[Tensor], Tensor]


class EdgeBranch(nn.Module):
    """Boundary logits from all levels (IRNet, fig. 3): 1 x 1 to 32 channels each, joined.

    Args:
        levels: Levels of the backbone.
    """

    stride = STRIDES["irn"]

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        width = 32
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(level.channels, width, 1, bias=False), nn.GroupNorm(4, width))
            for level in levels
        )
        self.join = nn.Conv2d(width * len(levels), 1, 1)

    def forward(self, features: Sequence[Tensor], to_grid: Sequence[_ToGrid]) -> Tensor:
        """(B, 1, h, w) logits on the grid that ``to_grid`` brings each level to."""
        reduced = [
            bring(r(f)).relu() for r, f, bring in zip(self.reduce, features, to_grid, strict=True)
        ]
        return self.join(torch.cat(reduced, 1))


class FeatureBranch(nn.Module):
    """Features whose distances are affinities, from the last three levels (AffinityNet, sec. 3.2).

    It starts as the published one: He's normal weights in front of the levels, Xavier's uniform ones
    with a gain of 4 in the joining layer.

    Args:
        levels: Levels of the backbone.
    """

    stride = STRIDES["psa"]

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        widths = (64, 128, 256)
        self.reduce = nn.ModuleList(
            nn.Conv2d(level.channels, width, 1, bias=False)
            for level, width in zip(levels[-3:], widths, strict=True)
        )
        self.join = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)
        for layer in self.reduce.children():
            nn.init.kaiming_normal_(layer.get_parameter("weight"))
        nn.init.xavier_uniform_(self.join.weight, gain=4)

    def forward(self, features: Sequence[Tensor], to_grid: Sequence[_ToGrid]) -> Tensor:
        """(B, 448, h, w) features on the grid that ``to_grid`` brings each level to."""
        last = zip(self.reduce, features[-3:], to_grid[-3:], strict=True)
        return F.elu(self.join(torch.cat([bring(F.elu(r(f))) for r, f, bring in last], 1)))


class AffinityNetwork(nn.Module):
    """A backbone with one of the two branches.

    Its output has ceil(H / stride) x ceil(W / stride) cells. Levels of another stride are brought to
    this grid in one of two ways:

    * ``crop``, as published: a level s times coarser is enlarged s times (bilinear, half-pixel
      centres) and what reaches beyond the grid is cut off, a missing last row or column is repeated.
      So distances on coarse levels are right at every size, but behind convolutions whose cells lie
      at stride x i, a level at stride 16 lies (16 - 4) / 2 = 6 pixels further down and to the right
      than the finest one, in the mirror image as well. A stride that is no multiple of the branch's
      is stretched to the grid.
    * ``cells``: every level is sampled where its cells truly lie, on a grid that shares the image
      evenly, so that the output of a mirrored image is the mirrored output but for the network's
      own asymmetry.

    Attributes:
        stride: Pixels in one cell of the output.
        kind: ``irn`` or ``psa``.
        place: ``crop`` or ``cells``.

    Args:
        backbone: Any backbone.
        kind: ``irn``: boundary logits at stride 4; ``psa``: features at stride 8.
        train_backbone: Whether gradients reach the backbone (psa) or its features are fixed (irn).
        place: How levels are brought to the output's grid.
    """

    def __init__(
        self,
        backbone: Backbone,
        kind: Literal["irn", "psa"],
        train_backbone: bool,
        place: Placing = "crop",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        branch = EdgeBranch if kind == "irn" else FeatureBranch
        self.branch = branch(backbone.levels)
        self.kind = kind
        self.place = place
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
        with torch.set_grad_enabled(self.train_backbone and torch.is_grad_enabled()):
            features = self.backbone(images)
        return self.branch(features, self._to_grid((images.shape[-2], images.shape[-1])))

    def _to_grid(self, size: tuple[int, int]) -> list[_ToGrid]:
        """For each level what brings its maps to the output's grid, of images of ``size``."""
        grid = (-(-size[0] // self.stride), -(-size[1] // self.stride))
        if self.place == "crop":
            factors = [level.stride / self.stride for level in self.backbone.levels]
            return [partial(_enlarged, factor=factor, grid=grid) for factor in factors]
        found = self.backbone.cells(size)
        return [partial(place, cells=cells, image=size, size=grid) for cells in found]


def _enlarged(maps: Tensor, factor: float, grid: tuple[int, int]) -> Tensor:
    """Maps enlarged ``factor`` times and cut to the grid; stretched to it by a broken factor."""
    if maps.shape[-2:] == grid:
        return maps
    if factor != int(factor):
        return F.interpolate(maps, grid, mode="bilinear", align_corners=False)
    if factor > 1:
        maps = F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)
    maps = maps[..., : grid[0], : grid[1]]
    missing = (grid[0] - maps.shape[-2], grid[1] - maps.shape[-1])
    return F.pad(maps, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else maps
