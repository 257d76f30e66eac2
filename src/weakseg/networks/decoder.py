"""DeepLabV3+ on any of our backbones, at any input size; its decoder also as a head of a method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import (
    ASPP,
    ASPPPooling,
    DeepLabV3PlusDecoder,
)
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.networks.backbone import Backbone
from weakseg.ops.cells import moved, place

__all__ = ["DeepLabDecoder", "DeepLabV3Plus"]


class DeepLabDecoder(nn.Module):
    """Atrous spatial pyramid on the last level, and a decoder that adds the level of stride 4.

    By default Chen et al., ECCV 2018, of segmentation-models-pytorch's parts: separable convolutions
    of dilation, 48 channels of the fine level, one separable 3 x 3 behind them. The pyramid is
    enlarged by where the backbone's cells lie. ``dense`` is the one of RecurSeed's published
    network: dense convolutions, ``channels`` of the fine level, two 3 x 3 behind them with dropout
    of .5 and .1, a 3 x 3 classifier without bias, and aligned corners where the pyramid is enlarged.

    Args:
        backbone: One of its levels must have stride 4, the last one 8 or 16. It is no part of this
            module.
        num_outputs: Channels of the logits, background included.
        channels: Width of the decoder.
        dilations: Of the pyramid, at output stride 16; doubled at 8 (the paper's rule).
        where: The recipe's key that a wrong backbone is reported under.
        dense: The published decoder of RecurSeed.

    Attributes:
        fine: Index of the level of stride 4; the logits lie on its cells.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_outputs: int,
        channels: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
        where: str = "segmenter.backbone",
        *,
        dense: bool = False,
    ) -> None:
        super().__init__()
        levels = backbone.levels
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
        self.fine = fine[-1]
        self.dense = dense
        self._cells = backbone.cells
        rates = tuple(d * 16 // stride for d in dilations)
        inputs = (levels[self.fine].channels, levels[-1].channels)
        self.decoder: DeepLabV3PlusDecoder | _Dense
        if dense:
            self.decoder = _Dense(*inputs, channels, rates)
        else:
            self.decoder = DeepLabV3PlusDecoder(
                encoder_channels=(3, 0, *inputs),
                encoder_depth=4,
                out_channels=channels,
                atrous_rates=rates,
                output_stride=stride,
                aspp_separable=True,
                aspp_dropout=0.5,
            )
        for pooling in self.decoder.modules():
            if isinstance(pooling, ASPPPooling):
                pooling[2] = _PooledNorm(pooling[2].num_features)
        side = 3 if dense else 1
        self.classifier = nn.Conv2d(channels, num_outputs, side, padding=side // 2, bias=not dense)

    def padded(self, images: Tensor) -> Tensor:
        """Images with zeros to the right and below, so that all levels cover the same pixels."""
        right, below = -images.shape[-1] % self.stride, -images.shape[-2] % self.stride
        return F.pad(images, (0, right, 0, below)) if right or below else images

    def decode(self, images: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_outputs, H / 4, W / 4) of padded images and the backbone's levels."""
        fine = self.decoder.block1(levels[self.fine])
        pyramid, grid = self.decoder.aspp(levels[-1]), (fine.shape[-2], fine.shape[-1])
        if self.dense:
            pyramid = F.interpolate(pyramid, grid, mode="bilinear", align_corners=True)
        else:
            cells = self._cells((images.shape[-2], images.shape[-1]))
            pyramid = moved(pyramid, cells[-1], cells[self.fine], grid).to(fine.dtype)
        return self.classifier(self.decoder.block2(torch.cat([pyramid, fine], 1)))

    def enlarged(self, logits: Tensor, padded: Tensor, images: Tensor) -> Tensor:
        """Logits of padded images at the size of the images themselves, float32."""
        size = (padded.shape[-2], padded.shape[-1])
        maps = place(logits, self._cells(size)[self.fine], size, size)
        return maps[..., : images.shape[-2], : images.shape[-1]]


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
        super().__init__(backbone, num_outputs, channels, dilations)
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_outputs, H, W) of normalised images (B, 3, H, W) of any size."""
        return self.with_levels(images)[0]

    def with_levels(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits as of ``forward``, and the backbone's levels that they are made of."""
        padded = self.padded(images)
        levels = self.backbone(padded)
        return self.enlarged(self.decode(padded, levels), padded, images), levels


class _Dense(nn.Module):
    """Pyramid and decoder of RecurSeed's published network, all convolutions dense.

    Args:
        fine: Channels of the level of stride 4.
        deep: Channels of the last level.
        channels: Width.
        dilations: Of the pyramid.
    """

    def __init__(self, fine: int, deep: int, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.aspp = ASPP(deep, channels, dilations, separable=False, dropout=0.5)
        self.block1 = _convolved(fine, channels, 1)
        self.block2 = nn.Sequential(
            *_convolved(2 * channels, channels, 3),
            nn.Dropout(0.5),
            *_convolved(channels, channels, 3),
            nn.Dropout(0.1),
        )


def _convolved(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class _PooledNorm(nn.BatchNorm2d):
    """BatchNorm behind global pooling, where one image has no spread: running statistics serve it."""

    def forward(self, pooled: Tensor) -> Tensor:
        """Normalises (B, C, 1, 1); a batch of one leaves the running statistics alone."""
        if self.training and len(pooled) > 1:
            return super().forward(pooled)
        return F.batch_norm(
            pooled, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
