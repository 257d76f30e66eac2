r"""SEAM (Wang et al., Self-supervised Equivariant Attention Mechanism, CVPR 2020).

The idea. Masks move with the image, but maps trained by classification do not: a smaller view of
the same image gives different maps. SEAM trains on pairs of views and asks the maps to follow the
transformation A between them. A pixel correlation module (PCM) lets each pixel of a map gather
the evidence of pixels that look alike; its maps are the seeds.

Raw maps :math:`a_i \in R^{K \times h \times w}` of view i; :math:`n(\cdot)` is ReLU, then min-max, 0
where a class is not tagged; :math:`A^{-1}` brings view 2 to the cells of view 1; :math:`\ell` is the
multi-label soft-margin loss and Y the tags:

.. math::
    L_{cls} &= \tfrac12 [\ell(\mathrm{GAP}(a_1), Y) + \ell(\mathrm{GAP}(a_2), Y)] \\
    L_{ER} &= \mathrm{mean} |n(a_1) - A^{-1} n(a_2)|

PCM, with evidence :math:`e \in [0, 1]^{(K+1) \times N}` (maps divided by their maximum, and the
background :math:`1 - \max_k e_k`), keys :math:`f \in R^{D \times N}` of length 1 at each of N pixels,
and power q:

.. math::
    y = e S, \qquad S_{ij} = \mathrm{ReLU}(f_i^\top f_j)^q / \sum_i \mathrm{ReLU}(f_i^\top f_j)^q

Where keys are learned, two more losses teach them. H sets all foreground but each pixel's largest
to 0 and puts the background in front, sg stops gradients, top is the mean of each image's largest
20 %, and min-max is taken of y too:

.. math::
    L_{ECR} &= \mathrm{top} |\mathrm{sg}\, H(A^{-1} n(a_2)) - n(y_1)|
             + \mathrm{top} |\mathrm{sg}\, H(n(a_1)) - A^{-1} n(y_2)| \\
    L_{min} &= \tfrac12 \sum_{i=1,2} \text{mean of the lowest 25 \% of } \max_k y_{ik}
    \text{ (y as it is)}

Paper and code. The published code has learned keys (projections of two levels after ReLU, and the
image), q = 1, all foreground but the largest set to 0 in e as well (``rivals: all``), and
:math:`L_{min}`, which the paper does not list. It enlarges all maps to the pixels of their views,
with corners aligned, before it pools, normalises and compares them (``compare: pixels``): cells at
the border then weigh a little more than half as much as the others in :math:`L_{cls}`. Its view 2 is
interpolated with corners aligned and no antialiasing, and need not be a whole number of cells: 134
px of 448. ``preset: paper``, which the recipes ``seam_wr38`` have, is all of that. *Our defaults
depart from it*, because in short trainings they do better (docs/methods/seam.md): keys are the
features themselves, less their mean over the image, and maps are pooled and compared cell by cell,
all cells alike, each where it lies in the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weakseg.config import Frozen, Pixels
from weakseg.errors import UserError
from weakseg.methods.base import Batch, Card, Maps, Method, methods
from weakseg.networks.backbone import MakeBackbone
from weakseg.networks.heads import CAMHead
from weakseg.ops import Cells, View, gate, normalise_max, normalise_min_max
from weakseg.ops.cells import PIXELS, moved

__all__ = ["PRESETS", "SEAM", "PixelCorrelation"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "scale": 0.3,
        "compare": "pixels",
        "minimum": 1.0,
        "keys": "published",
        "rivals": "all",
        "levels": (-3, -2),
        "power": 1.0,
        "dropout": 0.5,
    },
}

Keys = Literal["features", "learned", "published"]

_ENTRIES = 2**24  # of a block of affinities: 64 MB in float32
_EPS = 1e-5
_SMALLEST = 96  # pixels of a view: on shapes-v1 at 128 px, half-sized views cost 1.6 points


class PixelCorrelation(nn.Module):
    """PCM: lets each pixel gather the scores of pixels with like features.

    No gradient reaches the maps, the levels or the image: only the convolutions here learn, and
    only through the affinities.

    Keys as published are projections of positive features, so at first any two of them nearly
    agree and PCM returns the mean of the image; it takes the published 10,000 steps to learn
    better. The other kinds are of use from the start: levels and image weigh the same, and what all
    pixels of the image have in common is subtracted.

    Args:
        channels: Of the two levels.
        kind: ``features``, the levels and the image themselves: nothing is learned; ``learned``,
            projections that start by keeping angles (orthogonal, no ReLU); ``published``.
        power: Of the affinities; more than 1 gives the most alike pixels more weight.
        block: Pixels that gather at a time; ``None`` = as many as keep the affinities in 64 MB.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        kind: Keys,
        power: float = 1.0,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.power = power
        self.block = block
        if kind == "features":
            return
        self.low = nn.Conv2d(channels[0], 64, 1, bias=False)
        self.high = nn.Conv2d(channels[1], 128, 1, bias=False)
        self.keys = nn.Conv2d(3 + 64 + 128, 192, 1, bias=False)
        if kind == "learned":
            for projection in (self.low, self.high, self.keys):
                nn.init.orthogonal_(projection.weight, gain=4)
        else:
            nn.init.kaiming_normal_(self.low.weight)
            nn.init.kaiming_normal_(self.high.weight)
            nn.init.xavier_uniform_(self.keys.weight, gain=4)

    def forward(
        self,
        maps: Tensor,
        images: Tensor,
        low: Tensor,
        high: Tensor,
        cells: tuple[Cells, Cells, Cells] | None = None,
    ) -> Tensor:
        """Revised maps (B, C, h, w), in the range of ``maps`` (B, C, h, w).

        Args:
            maps: What pixels gather.
            images: (B, 3, H, W).
            low: Features (B, C', h', w') of one level.
            high: Of the other.
            cells: Where the cells of maps, low and high lie in the images, so that each pixel of a
                map is compared by what lies there; ``None`` = corners aligned (code).
        """
        size = (maps.shape[-2], maps.shape[-1])
        keys = self._keys(images.detach(), low.detach(), high.detach(), size, cells)
        with torch.autocast(keys.device.type, enabled=False):
            keys = keys.float().flatten(2)
            if self.kind != "published":
                keys = keys - keys.mean(2, keepdim=True)
            keys = keys / (keys.norm(dim=1, keepdim=True) + _EPS)
            return self._gathered(maps.detach().float().flatten(2), keys).unflatten(2, size)

    def _keys(
        self,
        images: Tensor,
        low: Tensor,
        high: Tensor,
        size: tuple[int, int],
        cells: tuple[Cells, Cells, Cells] | None,
    ) -> Tensor:
        if self.kind != "features":
            low, high = self.low(low), self.high(high)
        if self.kind == "published":
            low, high = low.relu(), high.relu()
        parts = [images, low, high]
        if cells is None:
            parts = [_aligned(part, size) for part in parts]
        else:
            own, *others = cells
            places = (PIXELS, *others)
            parts = [moved(p, at, own, size) for p, at in zip(parts, places, strict=True)]
        if self.kind != "published":
            parts = [part.float() / (_length(part) + _EPS) for part in parts]
        keys = torch.cat(parts, 1)
        return keys if self.kind == "features" else self.keys(keys)

    def _gathered(self, maps: Tensor, keys: Tensor) -> Tensor:
        batch, _, pixels = keys.shape
        block = self.block or max(1, _ENTRIES // (batch * pixels))
        if block >= pixels:
            return self._gather(maps, keys, keys)
        gather: Callable[..., Tensor] = self._gather
        if torch.is_grad_enabled():
            # Affinities of a block are computed again for its gradient: N x N never exists.
            gather = partial(checkpoint, self._gather, use_reentrant=False)
        return torch.cat([gather(maps, keys, part) for part in keys.split(block, dim=2)], dim=2)

    def _gather(self, maps: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        affinity = (keys.transpose(1, 2) @ queries).relu()
        if self.power != 1:
            affinity = affinity**self.power
        return (maps @ affinity) / (affinity.sum(1, keepdim=True) + _EPS)


def _length(part: Tensor) -> Tensor:
    """Mean length of the features of an image's pixels."""
    return part.float().norm(dim=1, keepdim=True).mean((2, 3), keepdim=True)


@dataclass
class _Pair:
    """What the losses compare: maps of both views on one grid, in [0, 1], 0 for absent classes.

    Attributes:
        logits: (2, B, K) image logits.
        plain: (B, K, h, w) of view 1 and of view 2.
        revised: (B, K + 1, h, w) of PCM, likewise.
        lowest: Mean of the lowest quarter of each view's best foreground scores behind PCM.
        inside: (B, 1, h, w), 1 where both views show the image; maps are 0 elsewhere.
    """

    logits: Tensor
    plain: tuple[Tensor, Tensor]
    revised: tuple[Tensor, Tensor] | None
    lowest: Tensor
    inside: Tensor


@methods.register("seam")
class SEAM(Method):
    """CAM trained on pairs of views, with a module that spreads evidence between alike pixels."""

    heads: tuple[str, ...] = ("pcm", "cam")
    card = Card(
        name="seam",
        paper="Wang et al., CVPR 2020",
        year=2020,
        idea="maps must follow the image's transformation; alike pixels share their evidence",
        recipes=("voc12/seam_wr38", "coco14/seam_wr38"),
        published={
            "VOC train seed mIoU (ResNet-38, oracle threshold)": 55.41,
            "VOC train mIoU after walk (ResNet-38)": 63.61,
            "VOC val mIoU of the segmenter (ResNet-38)": 64.5,
            "COCO val mIoU of the segmenter (ResNet-38)": 31.9,
        },
    )

    class Config(Frozen):
        """Views, weights of the losses (0 = off), and PCM.

        Keys given beside ``preset`` win.
        """

        preset: Literal["default", "paper"] = Field(
            "default",
            description="paper = the published code: the values named below, and compare: pixels, "
            "keys: published, rivals: all",
        )
        scale: float | None = Field(
            None,
            gt=0,
            le=1,
            description="size of view 2; null = .3 (paper), or 96 pixels where that is more, .75 at most",
        )
        flip: bool = Field(False, description="mirror half of view 2")
        rotation: float = Field(0.0, ge=0, le=180, description="largest turn of view 2, in degrees")
        translation: float = Field(
            0.0, ge=0, lt=1, description="largest shift of view 2, as a share of its side"
        )
        compare: Literal["cells", "pixels"] = Field(
            "cells",
            description="where maps are pooled and compared, and what PCM's seeds are: cells, each "
            "at its place in the image; or pixels, maps enlarged to them with corners aligned, and "
            "view 2 shrunk alike (code)",
        )
        er: float = Field(1.0, ge=0, description="weight of equivariance (paper: 1)")
        ecr: float | None = Field(
            None,
            ge=0,
            description="weight of cross regularisation (paper: 1), which teaches PCM; null = 1 "
            "where PCM has anything to learn",
        )
        top: float = Field(
            0.2, gt=0, le=1, description="share of the largest differences that ecr averages"
        )
        minimum: float = Field(
            0.0, ge=0, description="weight of the code's pressure on low scores (code: 1)"
        )
        pcm: bool = Field(True, description="false = plain maps only: no ecr, no minimum")
        keys: Keys = Field(
            "features",
            description="what PCM compares: features = levels and image as they are, so that "
            "nothing is learned; learned = projections of them; published = the paper's",
        )
        rivals: Literal["all", "predicted", "none"] = Field(
            "none",
            description="whose larger score blanks a class before PCM: any class's (code), with "
            "each weighed by its predicted probability, or nobody's",
        )
        levels: tuple[int, int] = Field(
            (-2, -1),
            description="levels that PCM compares, counted from the last (paper: -3 and -2)",
        )
        power: float = Field(2.0, ge=1, description="of PCM's affinities (paper: 1)")
        block: Pixels | None = Field(
            None, description="pixels that PCM handles at a time; null = what fits in 64 MB"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="of whole feature maps (paper: .5)")

        @model_validator(mode="before")
        @classmethod
        def _apply_preset(cls, values: Any) -> Any:
            if isinstance(values, dict):
                return {**PRESETS.get(str(values.get("preset")), {}), **values}
            return values

        @model_validator(mode="after")
        def _something_learns(self) -> Any:
            if not self.pcm_learns and (self.ecr or self.minimum):
                mend = "set keys: learned" if self.pcm else "set pcm: true and keys: learned"
                raise ValueError(
                    f"ecr and minimum teach PCM's projections: leave them out, or {mend}"
                )
            if self.scale == 1 and self.er and not (self.flip or self.rotation or self.translation):
                raise ValueError(
                    "both views are the same: set scale below 1, or flip, rotation, translation"
                )
            if self.compare == "pixels" and (self.flip or self.rotation or self.translation):
                raise ValueError(
                    "compare: pixels knows smaller views alone: leave flip, rotation and "
                    "translation out, or set compare: cells"
                )
            if self.pcm_learns and self.ecr == 0:
                raise ValueError("PCM's projections learn from ecr alone: set keys: features")
            return self

        @property
        def pcm_learns(self) -> bool:
            """Whether PCM has projections that losses must teach."""
            return self.pcm and self.keys != "features"

        def weights(self) -> dict[str, float]:
            """Weight of each loss that is on."""
            ecr = float(self.pcm_learns) if self.ecr is None else self.ecr
            weights = {"cls": 1.0, "er": self.er, "ecr": ecr, "min": self.minimum}
            return {name: weight for name, weight in weights.items() if weight}

    config: Config

    def __init__(self, make_backbone: MakeBackbone, num_classes: int, config: Frozen) -> None:
        super().__init__(make_backbone, num_classes, config)
        self.backbone = make_backbone()
        levels = self.backbone.levels
        if not all(-len(levels) <= i < 0 for i in self.config.levels):
            raise UserError(
                f"levels {list(self.config.levels)} are not there",
                where="method.levels",
                mend=f"count from the last: -1 to -{len(levels)}",
            )
        self.dropout = nn.Dropout2d(self.config.dropout)
        self.head = CAMHead(levels[-1].channels, num_classes)
        self.weights = self.config.weights()
        self.terms = tuple(self.weights)
        if self.config.pcm:
            low, high = (levels[i].channels for i in self.config.levels)
            self.pcm = PixelCorrelation(
                (low, high), self.config.keys, self.config.power, self.config.block
            )
        else:
            self.heads = ("cam",)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Classification, equivariance, cross regularisation and the pressure on low scores."""
        compared = self._in_pixels if self.config.compare == "pixels" else self._in_cells
        pair = compared(batch.images, batch.tags)
        tags = batch.tags.expand_as(pair.logits)
        ours, theirs = pair.plain
        terms = {
            "cls": F.multilabel_soft_margin_loss(pair.logits, tags),
            "er": (ours - theirs).abs().mean(),
        }
        if pair.revised is not None:
            y1, y2 = pair.revised
            terms["ecr"] = self._largest((_target(theirs) * pair.inside - y1).abs())
            terms["ecr"] += self._largest((_target(ours) * pair.inside - y2).abs())
            terms["min"] = pair.lowest
        return {name: weight * terms[name] for name, weight in self.weights.items()}

    def _in_cells(self, images: Tensor, tags: Tensor) -> _Pair:
        """Maps of both views in the cells of view 1."""
        config, size = self.config, images.shape[-1]
        view = View.draw(
            images, self._view_size(size), config.flip, config.rotation, config.translation
        )
        plain1, revised1 = self._maps(images, tags, pcm=config.pcm_learns)
        plain2, revised2 = self._maps(view.of(images), tags, pcm=config.pcm_learns)
        grid = (plain1.shape[-2], plain1.shape[-1])

        own, seen = (self.backbone.cells((side, side))[-1] for side in (size, view.size))

        def back(maps: Tensor) -> tuple[Tensor, Tensor]:
            strides, offsets = (own.stride[0], seen.stride[0]), (own.offset[0], seen.offset[0])
            return view.back(maps, size, grid, strides, offsets)

        logits = torch.stack([plain1.mean((2, 3)), plain2.mean((2, 3))]).float()
        theirs, inside = back(gate(normalise_min_max(plain2.float().relu()), tags))
        ours = gate(normalise_min_max(plain1.float().relu()), tags) * inside
        pair = _Pair(logits, (ours, theirs), None, logits.new_zeros(()), inside)
        if revised1 is not None and revised2 is not None:
            tagged = _and_background(tags)
            y1 = gate(normalise_min_max(revised1), tagged) * inside
            pair.revised = y1, back(gate(normalise_min_max(revised2), tagged))[0]
            pair.lowest = _lowest(revised1, tags) / 2 + _lowest(revised2, tags) / 2
        return pair

    def _in_pixels(self, images: Tensor, tags: Tensor) -> _Pair:
        """Maps of both views, enlarged to their pixels and compared in those of view 2."""
        size = (self._view_size(images.shape[-1]),) * 2
        plain1, revised1 = self._maps(images, tags, pcm=self.config.pcm_learns)
        plain2, revised2 = self._maps(_aligned(images, size), tags, pcm=self.config.pcm_learns)
        plain1, plain2 = _aligned(plain1, images.shape[-2:]), _aligned(plain2, size)
        logits = torch.stack([plain1.mean((2, 3)), plain2.mean((2, 3))])
        plain = _aligned(_over_range(plain1), size), _over_range(plain2)
        pair = _Pair(
            logits,
            (gate(plain[0], tags), gate(plain[1], tags)),
            None,
            logits.new_zeros(()),
            torch.ones_like(plain[0][:, :1]),
        )
        if revised1 is not None and revised2 is not None:
            tagged = _and_background(tags)
            revised1, revised2 = _aligned(revised1, images.shape[-2:]), _aligned(revised2, size)
            y1, y2 = _aligned(_over_range(revised1), size), _over_range(revised2)
            pair.revised = gate(y1, tagged), gate(y2, tagged)
            pair.lowest = _lowest(revised1, tags) / 2 + _lowest(revised2, tags) / 2
        return pair

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """``pcm``: PCM's foreground maps in [0, 1]; ``cam``: plain maps as logits.

        With ``compare: pixels`` both are as large as the images.
        """
        plain, revised = self._maps(images, pcm=(head or self.heads[0]) == "pcm")
        size = (images.shape[-2], images.shape[-1])
        if self.config.compare == "pixels":
            cells = None
            plain = _aligned(plain, size)
            revised = None if revised is None else _aligned(revised, size)
        else:
            cells = self.backbone.cells(size)[-1]
        logits = plain.mean((2, 3))
        if revised is None:
            return Maps(plain, kind="logit", logits=logits, cells=cells)
        return Maps(revised[:, 1:].clamp(0, 1), kind="unit", logits=logits, cells=cells)

    def _maps(
        self, images: Tensor, tags: Tensor | None = None, pcm: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Plain maps (B, K, h, w) and PCM's (B, K + 1, h, w), background first."""
        levels = self.backbone(images)
        plain = self.head(self.dropout(levels[-1]))
        if not (pcm and self.config.pcm):
            return plain, None
        cells = None
        if self.config.compare == "cells":
            places = self.backbone.cells((images.shape[-2], images.shape[-1]))
            first, second = self.config.levels
            cells = (places[-1], places[first], places[second])
        low, high = (levels[i] for i in self.config.levels)
        evidence = self._evidence(plain.detach(), tags)
        return plain, self.pcm(evidence, images, low, high, cells)

    def _evidence(self, plain: Tensor, tags: Tensor | None) -> Tensor:
        """What PCM spreads: scores in [0, 1] with a background.

        Without rivals a class's map does not depend on the others, only the background does: so
        tags can keep absent classes out of it in training though inference has none.
        """
        if self.config.rivals == "all":
            positive = plain.float().relu()
            return _target((positive - _EPS).relu() / (positive.amax((2, 3), keepdim=True) + _EPS))
        scores = normalise_max(plain)
        if self.config.rivals == "none":
            return _with_background(scores if tags is None else gate(scores, tags))
        return _target(scores * plain.float().mean((2, 3), keepdim=True).sigmoid())

    def _view_size(self, size: int) -> int:
        """Side of view 2: a whole number of cells, so that no cell looks at padding alone; as the
        code cuts it where maps are compared in pixels."""
        scale = self.config.scale or min(0.75, max(0.3, _SMALLEST / size))
        if self.config.compare == "pixels":
            return max(1, int(scale * size))
        stride = self.backbone.levels[-1].stride
        cells = max(1, round(scale * size / stride))
        return min(cells * stride, size)

    def _largest(self, differences: Tensor) -> Tensor:
        """Mean of each image's largest differences (online hard example mining)."""
        flat = differences.flatten(1)
        return flat.topk(max(1, int(self.config.top * flat.shape[1])), dim=1).values.mean()


def _with_background(scores: Tensor) -> Tensor:
    return torch.cat([1 - scores.amax(1, keepdim=True), scores], 1)


def _and_background(tags: Tensor) -> Tensor:
    """Tags (B, K + 1), the background's first: every image has some."""
    return F.pad(tags, (1, 0), value=1.0)


def _aligned(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps or images at another size, the middles of their corner cells kept where they are."""
    return F.interpolate(maps.float(), size, mode="bilinear", align_corners=True)


def _over_range(maps: Tensor) -> Tensor:
    """n as in the code: what is least, and a little more, becomes 0."""
    maps = maps.relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low - _EPS).relu() / (high - low + _EPS)


def _target(scores: Tensor) -> Tensor:
    """H: scores without gradient, all but each pixel's largest set to 0, behind their background."""
    scores = scores.detach()
    best = scores.amax(1, keepdim=True)
    return _with_background(torch.where(scores == best, scores, torch.zeros_like(scores)))


def _lowest(revised: Tensor, tags: Tensor) -> Tensor:
    """Mean of the lowest quarter of the best scores of tagged classes, of maps (B, K + 1, h, w)."""
    best = gate(revised[:, 1:], tags).amax(1).flatten(1)
    return best.topk(max(1, best.shape[1] // 4), dim=1, largest=False).values.mean()
