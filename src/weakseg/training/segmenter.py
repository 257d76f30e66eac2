"""The segmentation network that is trained on pseudo masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.data.loading import MaskBatch
from weakseg.methods.base import Maps, Trainable
from weakseg.mixing import Mix, Scene, present
from weakseg.networks.backbone import Backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.heads import CAMHead
from weakseg.ops.confusion import IGNORE

__all__ = ["Segmenter"]


class Segmenter(Trainable):
    """A segmentation network with ordinary supervision; pixels of 255 are ignored.

    Args:
        network: Gives logits (B, K + 1, H, W), background first.
        mix: Makes mixed images of each batch, which are trained on too.
        mix_start: Share of the schedule without them.
        classify: Weight of an image-level classification loss; 0 = the network does not classify.
            Where it does, its classes limit the masks of images without tags: most errors of a
            model on new images are wrong classes.
    """

    heads = ("segmenter",)
    presence: Tensor

    def __init__(
        self,
        network: DeepLabV3Plus,
        mix: Mix | None = None,
        mix_start: float = 0.0,
        classify: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.mix, self.mix_start, self.classify = mix, mix_start, classify
        self.terms = ("seg",) if mix is None else ("seg", "mix_seg")
        self.tags: CAMHead | None = None
        if classify:
            self.terms += ("cls",)
            classes = network.classifier.out_channels - 1
            self.tags = CAMHead(network.backbone.levels[-1].channels, classes)
            self.register_buffer("presence", torch.tensor(0.5))

    @property
    def present(self) -> float:  # type: ignore[override]
        """Probability above which a class may be predicted in an image without tags."""
        return 0.5 if self.tags is None else self.presence.item()

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The network's backbone."""
        return self.network.backbone

    def losses(self, batch: MaskBatch, progress: float) -> dict[str, Tensor]:
        """Cross-entropy over the pixels that are not 255, of the images and of mixed ones."""
        found, levels = self.network.with_levels(batch.images)
        logits = found.float()
        terms = {"seg": _cross_entropy(logits, batch.masks)}
        if self.tags is not None:
            seen = present(batch.masks, logits.shape[1] - 1)[:, 1:].float()
            means = self.tags(levels[-1]).mean((2, 3)).float()
            terms["cls"] = self.classify * F.multilabel_soft_margin_loss(means, seen)
        if self.mix is not None and progress >= self.mix_start:
            mixed = self.mix(self._scene(batch, logits.detach()))
            terms["mix_seg"] = _cross_entropy(self.network(mixed.images).float(), mixed.labels)
        return terms

    def training_state(self) -> dict[str, Any]:
        """What the mix has gathered."""
        return {} if self.mix is None else self.mix.state()

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``training_state``."""
        if self.mix is not None:
            self.mix.load_state(state)

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """Class probabilities at the images' size."""
        found, levels = self.network.with_levels(images)
        probabilities = found.float().softmax(1)
        logits = None if self.tags is None else self.tags(levels[-1]).mean((2, 3))
        return Maps(probabilities[:, 1:], "probability", probabilities[:, :1], logits)

    def _scene(self, batch: MaskBatch, logits: Tensor) -> Scene:
        """The batch with the classes of its masks as tags."""
        tags = present(batch.masks, logits.shape[1] - 1)[:, 1:].float()
        size = (batch.images.shape[-2], batch.images.shape[-1])
        pictures = self.backbone.pictures(batch.images, size)
        return Scene(
            batch.images, tags, batch.masks, probabilities=logits.softmax(1), pictures=pictures
        )


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the pixels that are not 255; zero where all of them are."""
    total = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)
