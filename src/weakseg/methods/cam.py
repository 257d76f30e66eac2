r"""Class activation maps (Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016).

The idea. A classifier that ends in global average pooling and a linear layer keeps the places of
its evidence: the linear layer, applied at every position instead of to the pooled features, gives
one map for each class. The maps light up where the class was recognised, usually the most telling
part of an object: this is the seed that all other methods here widen.

The loss, with features :math:`f \in R^{B \times D \times h \times w}` of the last level, weights
:math:`W \in R^{K \times D}`, maps :math:`A = W f \in R^{B \times K \times h \times w}`, image
logits :math:`p = \mathrm{GAP}(A) \in R^{B \times K}` and tags :math:`Y \in \{0, 1\}^{B \times K}`:

.. math::
    L_{cls} = -\frac{1}{BK} \sum_{b,k} Y_{bk} \log \sigma(p_{bk}) + (1 - Y_{bk}) \log \sigma(-p_{bk})

Paper and code. The paper has ImageNet's single labels and a softmax; the weakly-supervised
segmentation codes (psa, irn) use the multi-label loss above, a 1 x 1 convolution without bias on
a ResNet whose last stride is removed without dilation, and the positive part of the maps divided
by each map's maximum. We follow those codes.

A classifier that somebody has trained already needs no loss: with ``from_classifier`` its own linear
layer becomes the maps, as in the paper, and nothing is trained. Its bias belongs to the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from weakseg.config import Channels, Frozen
from weakseg.methods.base import Batch, Card, Classifier, Maps, methods
from weakseg.networks.backbone import MakeBackbone
from weakseg.networks.classifier import classifier_neck
from weakseg.networks.heads import CAMHead, ProjectedHead
from weakseg.networks.spec import Projection

__all__ = ["CAM"]


@methods.register("cam")
class CAM(Classifier):
    """A multi-label classifier whose last maps are the class activation maps."""

    card = Card(
        name="cam",
        paper="Zhou et al., CVPR 2016",
        year=2016,
        idea="a classifier's linear layer, applied at every position, shows where it found each class",
        recipes=("demo", "voc12/cam_r50", "voc12/irn_r50"),
        published={"VOC train seed mIoU (irn, ResNet-50, oracle threshold)": 48.3},
    )

    terms = ("cls",)

    class Config(Frozen):
        """The head."""

        hidden: Channels | None = Field(
            None, description="channels of a layer before the maps; null = none (ACR's code: 256)"
        )
        from_classifier: Path | None = Field(
            None, description="weights of a trained classifier: its maps, without any training"
        )
        classifier_classes: (
            Path | tuple[str, ...] | dict[str, int | str | tuple[int | str, ...]] | None
        ) = Field(
            None,
            description="names of its outputs in order, or class: outputs, or a file with either; "
            "null = as the weights say, else in the order of the classes",
        )
        classifier_loss: Literal["softmax", "sigmoid"] = Field(
            "softmax",
            description="what it was trained with: softmax = one class in each image, sigmoid = any",
        )
        projection: Projection | None = Field(
            None, description="what from_classifier has become; written into model folders"
        )

        @model_validator(mode="after")
        def _consistent(self) -> Any:
            if self.from_classifier is None and self.classifier_classes is not None:
                raise ValueError("classifier_classes goes with from_classifier alone")
            if self.hidden is not None and (self.from_classifier or self.projection):
                raise ValueError("a given classifier has no hidden layer: leave `hidden` out")
            return self

        @model_serializer(mode="wrap")
        def _without_what_is_off(self, handler: Any) -> dict[str, Any]:
            values = handler(self)
            if self.from_classifier is None:
                for key in ("from_classifier", "classifier_classes", "classifier_loss"):
                    values.pop(key, None)
            if self.projection is None:
                values.pop("projection", None)
            return values

    config: Config

    def __init__(self, make_backbone: MakeBackbone, num_classes: int, config: Frozen) -> None:
        super().__init__(make_backbone, num_classes, config)
        self.backbone = make_backbone()
        projection = self.config.projection
        self.head: CAMHead | ProjectedHead
        if projection is not None:
            neck = classifier_neck(self.backbone.spec, projection.neck)
            self.head = ProjectedHead(projection, neck)
        else:
            channels = self.backbone.levels[-1].channels
            self.head = CAMHead(channels, num_classes, self.config.hidden)

    @classmethod
    def pools(cls, config: Frozen) -> bool:
        """A linear head on averages gives the averages of its maps; a hidden layer does not."""
        assert isinstance(config, cls.Config)
        return config.hidden is None and config.from_classifier is None

    def classify(self, batch: Batch) -> tuple[Maps, dict[str, Tensor]]:
        """Maps and the classification loss."""
        if batch.pooled is not None:  # a linear head gives the same logits before and after pooling
            scores = self.head(batch.pooled[:, :, None, None])
            maps = Maps(scores, kind="logit", logits=scores[:, :, 0, 0])
        else:
            maps = self(batch.images)
        assert maps.logits is not None
        return maps, {"cls": F.multilabel_soft_margin_loss(maps.logits.float(), batch.tags)}

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """Maps as logits, and their global average, or what a given classifier makes of it."""
        features = self.backbone(images)[-1]
        cells = self.backbone.cells((images.shape[-2], images.shape[-1]))[-1]
        if isinstance(self.head, ProjectedHead):
            maps, logits = self.head(features)
            return Maps(maps, kind="logit", logits=logits, cells=cells)
        maps = self.head(features)
        return Maps(maps, kind="logit", logits=maps.mean((2, 3)), cells=cells)
