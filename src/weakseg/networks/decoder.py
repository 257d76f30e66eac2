"""DeepLabV3+ on any of our backbones, at any input size; its decoder also as a head of a method."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import (
    ASPPPooling,
    DeepLabV3PlusDecoder,
)
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.networks.backbone import Backbone, Level

__all__ = ["DeepLabDecoder", "DeepLabV3Plus", "upsampled"]


class DeepLabDecoder(nn.Module):
    """Atrous spatial pyramid on the last level, and a decoder that adds the level of stride 4.

    The decoder is segmentation-models-pytorch's (Chen et al., ECCV 2018).

    Args:
        levels: Of the backbone; one must have stride 4, the last one 8 or 16.
        num_outputs: Channels of the logits, background included.
        channels: Width of the decoder.
        dilations: Of the pyramid, at output stride 16; doubled at 8 (the paper's rule).
        where: The recipe's key that a wrong backbone is reported under.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        num_outputs: int,
        channels: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
        where: str = "segmenter.backbone",
    ) -> None:
        super().__init__()
        fine = [i for i, level in enumerate(levels) if level.stride == 4]
        stride = levels[-1].stride
        if not fine or stride not in (8, 16):
            raise UserError(
                "the decoder needs levels of stride 4 and of 8 or 16; the backbone has "
                f"{[level.stride for level in levels]}",
                where=where,
                mend="set output_stride: 16 (or 8)"
                if fine
                else "give it a convolutional backbone, such as {name: resnet50.tv_in1k}",
            )
        self.stride = stride
        self._fine = fine[-1]
        self.decoder = DeepLabV3PlusDecoder(
            encoder_channels=(3, 0, levels[self._fine].channels, levels[-1].channels),
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

    def padded(self, images: Tensor) -> Tensor:
        """Images with zeros to the right and below, so that all levels cover the same pixels."""
        right, below = -images.shape[-1] % self.stride, -images.shape[-2] % self.stride
        return F.pad(images, (0, right, 0, below)) if right or below else images

    def decode(self, images: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_outputs, H / 4, W / 4) of padded images and the backbone's levels."""
        return self.classifier(self.decoder([images, images, levels[self._fine], levels[-1]]))


class DeepLabV3Plus(DeepLabDecoder):
    """Backbone and decoder: a segmentation network for images of any size.

    Args:
        backbone: Must have output stride 8 or 16 and a level of stride 4.
        num_outputs: Channels of the logits, background included.
        channels: Width of the decoder.
        dilations: Of the pyramid, at output stride 16.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_outputs: int,
        channels: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__(backbone.levels, num_outputs, channels, dilations)
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_outputs, H, W) of normalised images (B, 3, H, W) of any size."""
        return self.with_levels(images)[0]

    def with_levels(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits as of ``forward``, and the backbone's levels that they are made of."""
        padded = self.padded(images)
        levels = self.backbone(padded)
        return upsampled(self.decode(padded, levels), padded, images), levels


def upsampled(coarse: Tensor, padded: Tensor, images: Tensor) -> Tensor:
    """Maps of padded images at the size of the images themselves."""
    maps = F.interpolate(coarse.float(), padded.shape[-2:], mode="bilinear", align_corners=False)
    return maps[..., : images.shape[-2], : images.shape[-1]]


class _PooledNorm(nn.BatchNorm2d):
    """BatchNorm behind global pooling, where one image has no spread: running statistics serve it."""

    def forward(self, pooled: Tensor) -> Tensor:
        """Normalises (B, C, 1, 1); a batch of one leaves the running statistics alone."""
        if self.training and len(pooled) > 1:
            return super().forward(pooled)
        return F.batch_norm(
            pooled, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
