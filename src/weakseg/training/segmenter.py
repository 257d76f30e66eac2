"""The segmentation network that is trained on pseudo masks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weakseg.data.loading import IGNORE, MaskBatch
from weakseg.methods.base import Maps, Trainable
from weakseg.networks.backbone import Backbone
from weakseg.networks.decoder import DeepLabV3Plus

__all__ = ["Segmenter"]


class Segmenter(Trainable):
    """A segmentation network with ordinary supervision; pixels of 255 are ignored.

    Args:
        network: Gives logits (B, K + 1, H, W), background first.
    """

    heads = ("segmenter",)
    terms = ("seg",)

    def __init__(self, network: DeepLabV3Plus) -> None:
        super().__init__()
        self.network = network

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The network's backbone."""
        return self.network.backbone

    def losses(self, batch: MaskBatch, progress: float) -> dict[str, Tensor]:
        """Cross-entropy over the pixels that are not 255; zero where all of them are."""
        logits = self.network(batch.images).float()
        total = F.cross_entropy(logits, batch.masks, ignore_index=IGNORE, reduction="sum")
        return {"seg": total / (batch.masks != IGNORE).sum().clamp(min=1)}

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        """Class probabilities at the images' size."""
        probabilities = self.network(images).float().softmax(1)
        return Maps(probabilities[:, 1:], kind="probability", background=probabilities[:, :1])
