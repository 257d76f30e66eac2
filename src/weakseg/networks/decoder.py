"""DeepLabV3+ on any of our backbones, at any input size."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import (
    ASPPPooling,
    DeepLabV3PlusDecoder,
)
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.networks.backbone import Backbone

__all__ = ["DeepLabV3Plus"]


class DeepLabV3Plus(nn.Module):
    """Backbone, atrous spatial pyramid, and a decoder that adds the stride-4 level.

    The decoder is segmentation-models-pytorch's (Chen et al., ECCV 2018).

    Args:
        backbone: Must have output stride 8 or 16 and a level of stride 4.
        num_outputs: Channels of the logits, background included.
        channels: Width of the decoder.
        dilations: Of the pyramid, at output stride 16; doubled at 8 (the paper's rule).
    """

    def __init__(
        self,
        backbone: Backbone,
        num_outputs: int,
        channels: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        fine = [i for i, level in enumerate(backbone.levels) if level.stride == 4]
        stride = backbone.levels[-1].stride
        if not fine or stride not in (8, 16):
            raise UserError(
                f"DeepLabV3+ needs levels of stride 4 and of 8 or 16; {backbone.spec.name} has "
                f"{[level.stride for level in backbone.levels]}",
                where="segmenter.backbone",
                mend="set output_stride: 16 (or 8)",
            )
        self.backbone = backbone
        self.stride = stride
        self._fine = fine[-1]
        fine_channels, deep_channels = (
            backbone.levels[self._fine].channels,
            backbone.levels[-1].channels,
        )
        self.decoder = DeepLabV3PlusDecoder(
            encoder_channels=(3, 0, fine_channels, deep_channels),
            encoder_depth=4,
            out_channels=channels,
            atrous_rates=tuple(d * 16 // stride for d in dilations),
            output_stride=stride,
            aspp_separable=True,
            aspp_dropout=0.5,
        )
        for pooling in self.decoder.modules():
            if isinstance(pooling, ASPPPooling):
                pooling[2] = _PooledNorm(pooling[2].num_features)
        self.classifier = nn.Conv2d(channels, num_outputs, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_outputs, H, W) of normalised images (B, 3, H, W) of any size."""
        height, width = images.shape[-2:]
        right, below = -width % self.stride, -height % self.stride
        levels = self.backbone(F.pad(images, (0, right, 0, below)) if right or below else images)
        coarse = self.classifier(self.decoder([images, images, levels[self._fine], levels[-1]]))
        padded = (height + below, width + right)
        logits = F.interpolate(coarse.float(), padded, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


class _PooledNorm(nn.BatchNorm2d):
    """BatchNorm behind global pooling, where one image has no spread: running statistics serve it."""

    def forward(self, pooled: Tensor) -> Tensor:
        """Normalises (B, C, 1, 1); a batch of one leaves the running statistics alone."""
        if self.training and len(pooled) > 1:
            return super().forward(pooled)
        return F.batch_norm(
            pooled, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
