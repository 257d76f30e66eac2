"""Heads on the last level of a backbone."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["CAMHead"]


class CAMHead(nn.Module):
    """A 1 x 1 convolution without bias: class activation maps as logits.

    Global average pooling of the maps gives the image logits, and equals the linear classifier on
    pooled features, so the classifier's weights project back to places (Zhou et al., CVPR 2016,
    eq. 2).

    Args:
        channels: Channels of the features.
        num_classes: K, foreground classes.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, K, h, w) of features (B, C, h, w)."""
        return self.classifier(features)
