"""torchvision's classifiers as backbones: ``torchvision/densenet121`` and its like.

For weights whose tensors torchvision names otherwise than timm does, or that were trained with its
padding. A network must be a chain of modules up to its pooling; that chain is the trunk, under
torchvision's own names, and its last map is exactly what the network's classifier pools.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import DenseNet

from weakseg.networks.checkpoint import read_checkpoint
from weakseg.networks.spec import BackboneSpec

__all__ = [
    "PREFIX",
    "TorchvisionTrunk",
    "build_torchvision",
    "create_torchvision",
    "in_torchvision",
]

PREFIX = "torchvision/"
"""Begins the names of these backbones in recipes."""

_CHAINS = (  # children that a family's image goes through before it is pooled, in order
    ("features",),  # densenet, mobilenet, efficientnet, convnext, vgg
    ("layers",),  # mnasnet
    ("stem", "trunk_output"),  # regnet
    ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),  # resnet
    ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),  # shufflenet
)
_PROBE = 256


class TorchvisionTrunk(nn.Module):
    """A torchvision classifier up to its pooling; gives the last map of each stride.

    Args:
        classifier: The network; its modules are shared, not copied.

    Raises:
        ValueError: It is not a chain of modules that is known here.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        chain = next((c for c in _CHAINS if all(hasattr(classifier, n) for n in c)), None)
        if chain is None:
            raise ValueError(
                f"{type(classifier).__name__} is no chain of modules up to its pooling"
            )
        for name in chain:
            self.add_module(name, getattr(classifier, name))
        self._activate = isinstance(classifier, DenseNet)  # whose last ReLU is no module
        self._ends = self._last_of_each_size()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of images (B, 3, H, W), finest first."""
        levels = []
        x = images
        for i, step in enumerate(self._steps()):
            x = step(x)
            if i in self._ends:
                levels.append(x)
        if self._activate:
            levels[-1] = levels[-1].relu()
        return levels

    def _steps(self) -> list[nn.Module]:
        """The chain, with containers replaced by what they hold."""
        steps: list[nn.Module] = []
        for child in self.children():
            steps += child.children() if isinstance(child, nn.Sequential) else [child]
        return steps

    def _last_of_each_size(self) -> set[int]:
        sides = []
        training = self.training
        self.eval()
        with torch.no_grad():
            x = torch.zeros(1, 3, _PROBE, _PROBE)
            for step in self._steps():
                x = step(x)
                sides.append(x.shape[-1])
        self.train(training)
        return {i for i, side in enumerate(sides) if side not in sides[i + 1 :]}


def in_torchvision(name: str) -> bool:
    """Whether a backbone's name says torchvision."""
    return name.startswith(PREFIX)


def build_torchvision(spec: BackboneSpec, **arguments: Any) -> nn.Module:
    """The whole classifier that ``spec`` names, with random weights unless ``arguments`` say else."""
    name = spec.name.removeprefix(PREFIX).partition(".")[0]
    return torchvision.models.get_model(name, **{"weights": None, **spec.options, **arguments})


def create_torchvision(spec: BackboneSpec, file: Path | None) -> TorchvisionTrunk:
    """Builds the trunk that ``spec`` names and loads its weights.

    Args:
        spec: The part of the name after a dot is torchvision's name of the weights.
        file: A state dict in torchvision's names; None = those of its hub, or random ones.

    Raises:
        Exception: Whatever torchvision and torch raise of options, downloads and files.
    """
    if spec.dilate:
        raise ValueError("torchvision's networks are not dilated here; set dilate: false")
    tag = spec.name.partition(".")[2] or "DEFAULT"
    trunk = TorchvisionTrunk(build_torchvision(spec, weights=tag if spec.pretrained else None))
    if file is not None:
        state = trunk.state_dict()
        given = read_checkpoint(file).under(state)
        missing = [k for k in state if k not in given and not k.endswith("num_batches_tracked")]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(state)} tensors are missing, such as {missing[0]}"
            )
        state.update({k: v for k, v in given.items() if k in state})
        trunk.load_state_dict(state)
    return trunk
