"""The segmentation network that is trained on pseudo masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from weakseg.data.loading import MaskBatch
from weakseg.methods.base import Maps, Trainable
from weakseg.mixing import Mix, Scene, present
from weakseg.networks.backbone import Backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.ops.confusion import IGNORE

__all__ = ["Segmenter"]


class Segmenter(Trainable):
    """A segmentation network with ordinary supervision; pixels of 255 are ignored.

    Args:
        network: Gives logits (B, K + 1, H, W), background first.
        mix: Makes mixed images of each batch, which are trained on too.
        mix_start: Share of the schedule without them.
    """

    heads = ("segmenter",)

    def __init__(
        self, network: DeepLabV3Plus, mix: Mix | None = None, mix_start: float = 0.0
    ) -> None:
        super().__init__()
        self.network = network
        self.mix, self.mix_start = mix, mix_start
        self.terms = ("seg",) if mix is None else ("seg", "mix_seg")

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The network's backbone."""
        return self.network.backbone

    def losses(self, batch: MaskBatch, progress: float) -> dict[str, Tensor]:
        """Cross-entropy over the pixels that are not 255, of the images and of mixed ones."""
        logits = self.network(batch.images).float()
        terms = {"seg": _cross_entropy(logits, batch.masks)}
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
        probabilities = self.network(images).float().softmax(1)
        return Maps(probabilities[:, 1:], kind="probability", background=probabilities[:, :1])

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
