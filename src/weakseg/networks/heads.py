"""Heads on the last level of a backbone."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.networks.spec import Projection

__all__ = ["CAMHead", "ProjectedHead", "init_heads"]

_SURE = 1e-6  # what a probability keeps from 0 and 1, so that its logit is finite


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


def init_heads(model: nn.Module, kind: Literal["default", "kaiming", "xavier"]) -> None:
    """Draws the first weights of every :class:`CAMHead` of a model, as a published code did.

    ``kaiming``: normal numbers of deviation sqrt(2 / channels) (Puzzle-CAM); ``xavier``: uniform ones
    of deviation sqrt(2 / (channels + classes)) (psa, SEAM, ACR); ``default`` leaves PyTorch's, uniform
    of deviation sqrt(1 / (3 channels)) (irn).
    """
    if kind == "default":
        return
    draw = nn.init.kaiming_normal_ if kind == "kaiming" else nn.init.xavier_uniform_
    for head in model.modules():
        if isinstance(head, CAMHead):
            for weight in head.parameters():
                draw(weight)


class ProjectedHead(nn.Module):
    """The linear layer of a given classifier, applied at every position.

    Its weights alone give the maps; its bias has no place in the image and belongs to the logits
    (Zhou et al., CVPR 2016, leave it out). Where several outputs stand for one class, its map is
    the largest of theirs at each position.

    Args:
        projection: Numbers of outputs and channels, and the outputs of each class.
        neck: Module between the backbone's last level and the pooling.
    """

    def __init__(self, projection: Projection, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck
        self.classifier = nn.Conv2d(projection.channels, projection.outputs, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(projection.outputs))
        self._projection = projection

    def extra_repr(self) -> str:
        """The mapping too: it decides what the module computes."""
        return repr(self._projection)

    def outputs(self, features: Tensor) -> Tensor:
        """(B, N) what the classifier itself says of features (B, C, h, w) of the last level."""
        return self._outputs(self.neck(features))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, K, h, w) and logits (B, K) of features (B, C, h, w).

        The logits' sigmoid is the probability of a class: with ``softmax`` the sum over its
        outputs, with ``sigmoid`` that of its strongest output.
        """
        features = self.neck(features)
        used = sorted({i for group in self._projection.classes for i in group})
        maps = F.conv2d(features, self.classifier.weight[used])
        groups = [[used.index(i) for i in group] for group in self._projection.classes]
        maps = torch.stack([maps[:, group].amax(1) for group in groups], 1)
        return maps, self._logits(self._outputs(features).float())

    def _outputs(self, features: Tensor) -> Tensor:
        return features.mean((2, 3)) @ self.classifier.weight.flatten(1).T + self.bias

    def _logits(self, outputs: Tensor) -> Tensor:
        if self._projection.loss == "sigmoid":
            groups = [outputs[:, list(g)].amax(1) for g in self._projection.classes]
            return torch.stack(groups, 1)
        shares = outputs.softmax(1)
        sums = [shares[:, list(g)].sum(1) for g in self._projection.classes]
        return torch.stack(sums, 1).clamp(_SURE, 1 - _SURE).logit()
