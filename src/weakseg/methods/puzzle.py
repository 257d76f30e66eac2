r"""Puzzle-CAM (Jo and Yu, Puzzle-CAM: Improved Localization via Matching Partial and Full Features, ICIP 2021).

The idea. Cut an image into tiles and look at each tile alone: the classifier can no longer rely on
the most telling part, because some tiles do not hold it, and its maps spread over the rest of the
object. Laid side by side again, the tiles' maps should equal the maps of the whole image. Asking
for that while both are trained to classify teaches the network to show, on whole images, all that
it can recognise in pieces.

The loss, with maps :math:`A \in R^{B \times K \times h \times w}` of the whole images, merged maps
of the tiles :math:`A^{re} \in R^{B \times K \times h \times w}`, tags
:math:`Y \in \{0, 1\}^{B \times K}`, the multi-label soft-margin loss :math:`\ell` and the share
:math:`t \in [0, 1)` of the schedule:

.. math::
    L &= \ell(\mathrm{GAP}(A), Y) + \ell(\mathrm{GAP}(A^{re}), Y) + \alpha(t) L_{re} \\
    L_{re} &= \frac{1}{BKhw} \sum_{b,k,x} Y_{bk} |A_{bkx} - A^{re}_{bkx}|, \qquad
    \alpha(t) = \min(1, t / 0.5) \, \alpha_{max}

Paper and code. The maps are compared raw, as logits, and nothing is detached. The mean counts the
zeros of absent classes, so the term grows with the number of tags (``compare: mask``); the code
can also average the tagged classes alone (``select``), or all of them (``none``). The weight is 4
in the paper and 1 in the code's default: we take 4, and .5 for crops under 320 pixels. The code
needs full batches; ours takes any.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from weakseg.config import Count, Frozen
from weakseg.errors import UserError
from weakseg.methods.base import Batch, Card, Maps, Method, methods
from weakseg.networks.backbone import MakeBackbone
from weakseg.networks.heads import CAMHead

__all__ = ["Puzzle", "merge", "tile"]

_LARGE = 320  # pixels; on tune_320 at 192, alpha 4 gave 32.0 mIoU (oracle), .5 35.5, CAM 35.1


def tile(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cuts (B, C, H, W) into (rows * columns * B, C, H / rows, W / columns).

    Tiles are ordered by their place, row by row, and inside a place by image.
    """
    (rows, columns), (b, c, height, width) = grid, images.shape
    cells = images.reshape(b, c, rows, height // rows, columns, width // columns)
    return cells.permute(2, 4, 0, 1, 3, 5).reshape(
        rows * columns * b, c, height // rows, width // columns
    )


def merge(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lays tiles side by side again: the inverse of :func:`tile`."""
    (rows, columns), (n, c, height, width) = grid, tiles.shape
    cells = tiles.reshape(rows, columns, n // (rows * columns), c, height, width)
    return cells.permute(2, 3, 0, 4, 1, 5).reshape(-1, c, rows * height, columns * width)


@methods.register("puzzle")
class Puzzle(Method):
    """CAM trained so that the maps of tiles and of whole images agree."""

    card = Card(
        name="puzzle",
        paper="Jo and Yu, ICIP 2021",
        year=2021,
        idea="maps of an image's tiles, laid side by side, must match the maps of the whole image",
        recipes=("voc12/puzzle_r50", "voc12/puzzle_resnest101", "coco14/puzzle_r50"),
        published={
            "VOC train seed mIoU (ResNet-50, oracle threshold)": 51.53,
            "VOC train seed mIoU (ResNeSt-101, oracle threshold)": 61.85,
            "VOC train mIoU after walk and CRF (ResNet-50, oracle threshold)": 64.70,
            "VOC val mIoU of the segmenter (ResNeSt-101)": 66.9,
        },
    )

    class Config(Frozen):
        """Tiles and weights of the losses; a weight of 0 switches a loss off."""

        grid: tuple[Count, Count] = Field(
            (2, 2), description="rows and columns of tiles (paper: 2 x 2)"
        )
        cls: float = Field(1.0, ge=0, description="weight of the classification of whole images")
        p_cls: float = Field(1.0, ge=0, description="weight of the classification of merged tiles")
        alpha: float | None = Field(
            None,
            ge=0,
            description="final weight of the reconstruction (paper 4, code 1); null = 4, or .5 for "
            "crops under 320 pixels, where 4 costs the classes",
        )
        ramp: float = Field(
            0.5, ge=0, le=1, description="share of the schedule in which alpha grows from 0"
        )
        compare: Literal["mask", "select", "none"] = Field(
            "mask",
            description="maps compared: mask = tagged ones, zeros of the others counted in the "
            "mean (paper); select = mean of the tagged ones alone; none = all maps",
        )
        distance: Literal["l1", "l2"] = Field("l1", description="difference of maps (paper: l1)")

        @model_validator(mode="after")
        def _something_classifies(self) -> Any:
            if not self.cls and not self.p_cls:
                raise ValueError(
                    "without cls and p_cls nothing learns the classes; set one above 0"
                )
            return self

    config: Config

    def __init__(self, make_backbone: MakeBackbone, num_classes: int, config: Frozen) -> None:
        super().__init__(make_backbone, num_classes, config)
        self.backbone = make_backbone()
        self.head = CAMHead(self.backbone.levels[-1].channels, num_classes)
        weights = {"cls": self.config.cls, "p_cls": self.config.p_cls, "re": self.config.alpha}
        self.terms = tuple(name for name, weight in weights.items() if weight != 0)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Classification of wholes and of tiles, and their difference."""
        config = self.config
        in_tiles = bool(config.p_cls) or "re" in self.terms
        images = self._padded(batch.images) if in_tiles else batch.images
        whole = self._maps(images)
        terms = {"cls": config.cls * _classification(whole, batch.tags)} if config.cls else {}
        if in_tiles:
            parts = merge(self._maps(tile(images, config.grid)), config.grid)
            self._require_same_grid(whole, parts)
        if config.p_cls:
            terms["p_cls"] = config.p_cls * _classification(parts, batch.tags)
        if "re" in self.terms:
            difference = self._reconstruction(whole.float(), parts.float(), batch.tags)
            terms["re"] = self._alpha(batch.images.shape[-1], progress) * difference
        return terms

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """Maps of whole images as logits, and their global average."""
        maps = self._maps(images)
        cells = self.backbone.cells((images.shape[-2], images.shape[-1]))[-1]
        return Maps(maps, kind="logit", logits=maps.mean((2, 3)), cells=cells)

    def _maps(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1])

    def _alpha(self, crop: int, progress: float) -> float:
        """Weight of the reconstruction at ``progress`` of the schedule."""
        config = self.config
        final = config.alpha
        if final is None:
            final = 4.0 if crop >= _LARGE else 0.5
        return final * (min(1.0, progress / config.ramp) if config.ramp else 1.0)

    def _padded(self, images: Tensor) -> Tensor:
        """Images whose tiles hold a whole number of map cells, which then lie where the whole image's
        lie; the margin is the mean colour."""
        stride = self.backbone.levels[-1].stride
        (height, width), (rows, columns) = images.shape[-2:], self.config.grid
        bottom, right = -height % (rows * stride), -width % (columns * stride)
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def _require_same_grid(self, whole: Tensor, parts: Tensor) -> None:
        if whole.shape == parts.shape:
            return
        raise UserError(
            f"maps of whole images are {tuple(whole.shape[-2:])} and of merged tiles "
            f"{tuple(parts.shape[-2:])}: this backbone does not divide images evenly",
            where="method.grid",
            mend="take a crop whose tiles are a multiple of the backbone's largest stride, "
            f"{max(level.stride for level in self.backbone.levels)} pixels",
        )

    def _reconstruction(self, whole: Tensor, parts: Tensor, tags: Tensor) -> Tensor:
        difference = whole - parts
        difference = difference.abs() if self.config.distance == "l1" else difference.square()
        per_map = difference.mean((2, 3))
        if self.config.compare == "none":
            return per_map.mean()
        if self.config.compare == "mask":
            return (per_map * tags).mean()
        return (per_map * tags).sum() / tags.sum().clamp(min=1)


def _classification(maps: Tensor, tags: Tensor) -> Tensor:
    return F.multilabel_soft_margin_loss(maps.mean((2, 3)).float(), tags)
