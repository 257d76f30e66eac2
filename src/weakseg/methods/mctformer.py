r"""MCTformer (Xu et al., Multi-class Token Transformer, CVPR 2022; MCTformer+, TPAMI 2024).

The idea. A vision transformer's class token attends to the patches that speak for the image's one
class. With a token for each class, taught so that each one alone decides whether its class is
there, the attention of each token to the patches is a map of its class. These maps know where
objects end and class activation maps of the patch tokens know which class is which: their product
is the seed. Attention between patches, as affinity, completes it.

The loss, with L blocks, class tokens :math:`t^l \in R^{B \times K \times D}` behind block l, patch
tokens :math:`x \in R^{B \times D \times h \times w}` behind the last one, the patch CAM
:math:`P = W_{3 \times 3} * x + b \in R^{B \times K \times h \times w}` with its values
:math:`P_{(1)} \ge P_{(2)} \ge \dots` in falling order, :math:`\ell` the multi-label soft-margin loss
and tags :math:`Y \in \{0, 1\}^{B \times K}`:

.. math::
    L_{cls\,token} &= \ell(\tfrac1D \sum_d t^L_d, \; Y) \\
    L_{cls\,patch} &= \ell(\sum_r \rho^r P_{(r)} / \sum_r \rho^r, \; Y) \\
    L_{contrast} &= -\frac{w}{B L} \sum_b \frac{1}{\sum_k Y_{bk}} \sum_{l,k} Y_{bk}
        \log \mathrm{softmax}_j [\cos(t^l_{bk}, t^l_{bj})]_k

The maps, with :math:`A^l \in R^{K \times N}` and :math:`E^l \in R^{N \times N}` the attention of class
tokens to the N = h w patches and among patches, both averaged over heads, and n blocks that count:

.. math::
    F = \frac{N}{n} \sum_{l > L - n} A^l \odot \mathrm{ReLU}(P), \qquad
    F' = F \, (\tfrac1L \sum_l E^l)^\top

Maps of scales and mirrored images are enlarged and added, and the range of the sum is brought to
[0, 1] for each class: what all patches gather in F' is taken off.

Paper and code. There are two generations. V2 (CVPR) adds the attention of the last 3 blocks, pools P
by its average (:math:`\rho = 1`) and has no contrast; "+" takes the mean of 12 blocks and the square
root of F, :math:`\rho = .996` and w = 1, and resamples positions a little differently. The defaults
are V2's; the settings say what "+" has, and ``voc12/mctformer_plus_deit_s`` sets it. Sums and means
over blocks differ by a factor that normalisation removes. The factor N is ours (``relative``): a
large view shares the same attention among more patches, and without it small views would outweigh
large ones where scales are added. Both published programs read the patches as they leave the last
block, without the final norm (``norm``). Sides that are no multiples of a patch are resized to the
nearest ones here, and reduced to a multiple there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from weakseg.config import Count, Frozen
from weakseg.errors import UserError
from weakseg.methods.base import Batch, Card, Classifier, Maps, methods
from weakseg.networks.backbone import MakeBackbone
from weakseg.networks.tokens import ClassTokens, Resampling, TokenMaps

__all__ = ["MCTformer"]

_ROOT = 2.0**-20  # bounds the slope of the square root
_LEAST = 1e-6  # of an image's tags: less is none


@methods.register("mctformer")
class MCTformer(Classifier):
    """A vision transformer with one token for each class, whose attention finds the class."""

    heads: tuple[str, ...] = ("affinity", "fused", "cam", "attention")
    card = Card(
        name="mctformer",
        paper="Xu et al., CVPR 2022",
        year=2022,
        idea="a transformer with one token per class: each token's attention is its class's map",
        recipes=(
            "voc12/mctformer_deit_s",
            "voc12/mctformer_plus_deit_s",
            "coco14/mctformer_deit_s",
        ),
        published={
            "VOC train seed mIoU (DeiT-S, oracle threshold)": 61.7,
            "VOC train mIoU after walk (DeiT-S)": 69.1,
            "VOC val mIoU of the segmenter (ResNet-38)": 71.9,
            "VOC test mIoU of the segmenter (ResNet-38)": 71.6,
            "COCO val mIoU of the segmenter (ResNet-38)": 42.0,
        },
    )

    class Config(Frozen):
        """What V2 and "+" have in different ways; the defaults are V2's."""

        layers: Count = Field(
            3, description="last blocks whose class attention makes the maps (V2: 3, +: 12)"
        )
        root: bool = Field(False, description="square root of the fused maps (V2: false, +: true)")
        decay: float = Field(
            1.0,
            gt=0,
            le=1,
            description="weight of a patch's score in the image's, relative to the next higher "
            "one; 1 = plain average (V2: 1, +: .996)",
        )
        contrast: float = Field(
            0.0, ge=0, description="weight of the contrast between class tokens (V2: 0, +: 1)"
        )
        norm: bool = Field(
            False, description="final norm of the patch tokens that the CAM reads (both: false)"
        )
        positions: Resampling = Field(
            "bicubic+.1",
            description="how position embeddings are made for another grid of patches: bicubic by "
            "(m + .1) / n (V2), by m / n (+), or timm's, which is antialiased",
        )
        relative: bool = Field(
            True,
            description="attention counts relative to an even spread, so that scales weigh alike; "
            "false = as it is, so that small views weigh more (both)",
        )
        affinity: bool = Field(
            True,
            description="spread the seeds by the attention between patches (both: true); false "
            "where the network starts from random weights, whose patches attend to any object",
        )

    config: Config

    def __init__(self, make_backbone: MakeBackbone, num_classes: int, config: Frozen) -> None:
        super().__init__(make_backbone, num_classes, config)
        self.backbone = make_backbone()
        self.tokens = ClassTokens(
            self.backbone, num_classes, self.config.norm, self.config.positions
        )
        self.head = nn.Conv2d(self.backbone.levels[-1].channels, num_classes, 3, padding=1)
        depth = self.tokens.depth
        if self.config.layers > depth:
            raise UserError(
                f"layers {self.config.layers} are not there",
                where="method.layers",
                mend=f"set {depth} at most, or take a deeper backbone",
            )
        self.terms = ("cls_token", "cls_patch") + (("contrast",) if self.config.contrast else ())
        if not self.config.affinity:
            self.heads = self.heads[1:]

    def classify(self, batch: Batch) -> tuple[Maps, dict[str, Tensor]]:
        """Fused maps, and the loss terms of both kinds of tokens."""
        found = self.tokens(self.backbone, batch.images)
        cam = self.head(found.levels[-1]).float()
        by_token, by_patch = self._logits(found, cam)
        terms = {
            "cls_token": F.multilabel_soft_margin_loss(by_token, batch.tags),
            "cls_patch": F.multilabel_soft_margin_loss(by_patch, batch.tags),
        }
        if self.config.contrast:
            terms["contrast"] = self.config.contrast * _contrast(found.tokens, batch.tags)
        logits = (by_token + by_patch) / 2
        return self._maps(batch.images, self._fused(found, cam), logits), terms

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """``affinity``: fused maps spread; ``fused``; ``cam``: of patches, its positive part;
        ``attention``."""
        head = head or self.heads[0]
        found = self.tokens(self.backbone, images, affinity=head == "affinity")
        cam = self.head(found.levels[-1]).float()
        logits = torch.stack(self._logits(found, cam)).mean(0)
        if head == "cam":
            scores = cam.relu()
        elif head == "attention":
            scores = self._attention(found)
        else:
            scores = self._fused(found, cam)
        if found.affinity is not None:
            scores = _spread(scores, found.affinity)
        return self._maps(images, scores, logits)

    def features(self, images: Tensor) -> list[Tensor]:
        """Patch tokens (B, D, h, w) of each level, from the passage beside class tokens."""
        return self.tokens(self.backbone, images).levels

    def _maps(self, images: Tensor, scores: Tensor, logits: Tensor) -> Maps:
        cells = self.backbone.cells((images.shape[-2], images.shape[-1]))[-1]
        return Maps(scores, kind="unit", logits=logits, cells=cells)

    def _logits(self, found: TokenMaps, cam: Tensor) -> tuple[Tensor, Tensor]:
        """Image logits (B, K) of class tokens and of patches."""
        return found.tokens[:, -1].float().mean(2), _pooled(cam, self.config.decay)

    def _attention(self, found: TokenMaps) -> Tensor:
        """Class attention (B, K, h, w) of the blocks that count; where it is relative, 1 = as if
        spread over all patches."""
        attention = found.attention[:, -self.config.layers :].mean(1)
        return attention * attention[0, 0].numel() if self.config.relative else attention

    def _fused(self, found: TokenMaps, cam: Tensor) -> Tensor:
        """Attention times the positive part of the patch CAM (B, K, h, w), exact zeros kept."""
        fused = self._attention(found) * cam.relu()
        return _root(fused) if self.config.root else fused


def _pooled(cam: Tensor, decay: float) -> Tensor:
    """Means (B, K) of maps (B, K, h, w), in which scores count the less the lower they rank."""
    if decay == 1:
        return cam.mean((2, 3))
    ranked = cam.flatten(2).sort(dim=2, descending=True).values
    weights = decay ** torch.arange(ranked.shape[2], device=cam.device, dtype=cam.dtype)
    return (ranked * weights).sum(2) / weights.sum()


def _contrast(tokens: Tensor, tags: Tensor) -> Tensor:
    """How little class tokens (B, L, K, D) differ from each other: the mean over present classes
    (B, K) of each image, then over images that have any."""
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=3)
        own = (unit @ unit.transpose(2, 3)).log_softmax(3).diagonal(dim1=2, dim2=3)
    share = tags / tags.sum(1, keepdim=True).clamp(min=_LEAST)
    return -(own.mean(1) * share).sum() / tags.any(1).sum().clamp(min=1)


def _root(scores: Tensor) -> Tensor:
    """Square root, whose slope is bounded near 0."""
    smooth = (scores + _ROOT).sqrt()
    return smooth + (scores.detach().sqrt() - smooth.detach())


def _spread(scores: Tensor, affinity: Tensor) -> Tensor:
    """Scores (B, K, h, w) that each patch gathers from the patches that it attends to."""
    with torch.autocast(scores.device.type, enabled=False):
        gathered = scores.flatten(2) @ affinity.transpose(1, 2)
    return gathered.unflatten(2, scores.shape[2:])
