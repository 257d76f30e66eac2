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
        hidden: Channels of a layer with ReLU before the maps; ``None`` = no such layer.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int | None = None) -> None:
        super().__init__()
        self.hidden = None if hidden is None else nn.Conv2d(channels, hidden, 1, bias=False)
        self.classifier = nn.Conv2d(hidden or channels, num_classes, kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, K, h, w) of features (B, C, h, w)."""
        if self.hidden is not None:
            features = self.hidden(features).relu()
        return self.classifier(features)
