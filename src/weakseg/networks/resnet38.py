"""The wide ResNet with 38 layers that PSA, SEAM and ACR are built on, at output stride 8.

Wu, Shen and van den Hengel, Wider or Deeper: Revisiting the ResNet Model for Visual Recognition
(Pattern Recognition 2019), model A1, in the form in which Ahn and Kwak (AffinityNet, CVPR 2018)
made it dense: stages 5, 6 and 7 dilate in place of striding. Units are pre-activated (BatchNorm
and ReLU stand before each convolution), and no convolution has a bias.

Tensors are named as in the PyTorch files that those authors publish (``b4_1.conv_branch2a.weight``),
so that these load as they are; the MXNet file of the ImageNet weights is read too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models import load_state_dict
from torch import Tensor, nn

from weakseg.config import Frozen, validate
from weakseg.errors import UserError
from weakseg.networks.checkpoint import require_finite
from weakseg.networks.mxnet import read_params
from weakseg.networks.spec import BackboneSpec

__all__ = ["ResNet38", "create_resnet38"]

_BRANCHES = ("branch2a", "branch2b1", "branch2b2")
_NORM = {  # a norm's tensors in MXNet
    "weight": "arg:{}_gamma",
    "bias": "arg:{}_beta",
    "running_mean": "aux:{}_moving_mean",
    "running_var": "aux:{}_moving_var",
}
_SHALLOW = ("conv1a", "b2", "b2_1", "b2_2")  # what psa and SEAM do not train
_PUBLISHED = "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"
_SOURCE = (
    f"{_PUBLISHED}, linked from the READMEs of SEAM, psa and ACR (a damaged copy of it circulates)"
)


class ResNet38(nn.Module):
    """Wide ResNet-38 (A1) without its classifier: 105 million weights at full width.

    Args:
        width: Factor on all numbers of channels; less than 1 for tests and small machines.
        dropout: Share of channels dropped in the units b6 and b7. psa and SEAM .3 and .5, ACR .2
            and .2.
        freeze: Whether the convolution and the units at stride 1 and 2 (conv1a, b2, b2_1, b2_2)
            stay as they are: no gradients, and BatchNorm in evaluation mode. psa and SEAM do so,
            ACR does not.

    Attributes:
        levels: Channels and stride of what ``forward`` returns, in order.
    """

    def __init__(
        self, width: float = 1.0, dropout: tuple[float, float] = (0.3, 0.5), freeze: bool = False
    ) -> None:
        super().__init__()

        def scaled(*channels: int) -> tuple[int, ...]:
            return tuple(max(1, round(c * width)) for c in channels)

        first, last = scaled(64, 4096)
        self.conv1a = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self._add("b2", 3, scaled(64, 128, 128), stride=2)
        self._add("b3", 3, scaled(128, 256, 256), stride=2)
        self._add("b4", 6, scaled(256, 512, 512), stride=2)
        self._add("b5", 3, scaled(512, 512, 1024), dilations=(1, 2))
        self._add("b6", 1, scaled(1024, 512, 1024, 2048), dilations=(4,), dropout=dropout[0])
        self._add("b7", 1, scaled(2048, 1024, 2048, 4096), dilations=(4,), dropout=dropout[1])
        self.bn7 = nn.BatchNorm2d(last)
        self.levels = tuple(zip(scaled(128, 256, 512, 1024, 4096), (2, 4, 8, 8, 8), strict=True))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.freeze = freeze
        if freeze:
            for part in self._shallow():
                part.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Five levels of ``images`` (B, 3, H, W), at strides 2, 4, 8, 8 and 8.

        They are the activated inputs of b3, b4, b5 (conv4 of SEAM and psa) and b6 (conv5), and the
        activated output of b7 (conv6).
        """
        levels = []
        x = images
        for name, module in self.named_children():
            if not isinstance(module, _Unit):
                x = module(x)
                continue
            x, activated = module(x)
            if name in ("b3", "b4", "b5", "b6"):
                levels.append(activated)
        return [*levels, F.relu(x, inplace=True)]

    def train(self, mode: bool = True) -> ResNet38:
        """Sets the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            for part in self._shallow():
                part.eval()
        return self

    def _shallow(self) -> list[nn.Module]:
        return [getattr(self, name) for name in _SHALLOW]

    def _add(
        self,
        stage: str,
        units: int,
        channels: Sequence[int],
        stride: int = 1,
        dilations: Sequence[int] = (1, 1),
        dropout: float = 0.0,
    ) -> None:
        """Adds ``units`` units; those behind the first repeat its last numbers."""
        self.add_module(stage, _Unit(channels, stride, dilations, dropout))
        again = (channels[-1], *channels[1:])
        for i in range(1, units):
            self.add_module(f"{stage}_{i}", _Unit(again, 1, (dilations[-1],) * 2, dropout))


class _Unit(nn.Module):
    """A pre-activated residual unit.

    Args:
        channels: Of the input and behind each convolution. Two convolutions are 3 x 3 each, three
            are 1 x 1, 3 x 3, 1 x 1.
        stride: Of the first convolution and of the shortcut.
        dilations: Of the 3 x 3 convolutions.
        dropout: Before the second and third convolution; whole channels, as psa drops them.
    """

    bn_branch2a: nn.BatchNorm2d
    conv_branch2a: nn.Conv2d

    def __init__(
        self, channels: Sequence[int], stride: int, dilations: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        kernels, spread = (
            ((3, 3), tuple(dilations)) if len(channels) == 3 else ((1, 3, 1), (1, *dilations, 1))
        )
        self.dropout = dropout
        self.branches = _BRANCHES[: len(kernels)]
        for i, branch in enumerate(self.branches):
            norm = nn.BatchNorm2d(channels[i])
            convolution = nn.Conv2d(
                channels[i],
                channels[i + 1],
                kernels[i],
                stride=stride if i == 0 else 1,
                padding=kernels[i] // 2 * spread[i],
                dilation=spread[i],
                bias=False,
            )
            self.add_module(f"bn_{branch}", norm)
            self.add_module(f"conv_{branch}", convolution)
        self.conv_branch1 = (
            nn.Conv2d(channels[0], channels[-1], 1, stride=stride, bias=False)
            if stride > 1 or channels[0] != channels[-1]
            else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of shortcut and residual, and the activated input."""
        # In place, as a norm's output has no other reader: its backward needs only its input.
        activated = F.relu(self.bn_branch2a(x), inplace=True)
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(activated)
        y = self.conv_branch2a(activated)
        for branch in self.branches[1:]:
            y = F.relu(getattr(self, f"bn_{branch}")(y), inplace=True)
            y = F.dropout2d(y, self.dropout, self.training)
            y = getattr(self, f"conv_{branch}")(y)
        return shortcut + y, activated


_Share = Annotated[float, Field(ge=0, lt=1)]


class _Options(Frozen):
    """What ``backbone.options`` may hold; ``freeze: null`` = where the weights are not random."""

    width: float = Field(1.0, ge=1 / 64, le=4)
    dropout: tuple[_Share, _Share] = (0.3, 0.5)
    freeze: bool | None = None


def create_resnet38(spec: BackboneSpec, file: Path | None) -> ResNet38:
    """Builds the network that ``spec`` names and loads its weights.

    It always dilates: ``spec.dilate`` makes no difference.

    Args:
        spec: ``options`` are the arguments of ``ResNet38``. Without ``freeze`` the shallow units
            are frozen where weights are given, and where ``norm: frozen`` says that they follow.
        file: The published ``.params`` file, or a ``.safetensors`` or ``.pth`` file of this
            network, in which tensors of other names (heads) are left aside; None = random weights.

    Raises:
        UserError: Wrong options, weights that no hub has, or a file that does not fit.
    """
    options = validate(_Options, spec.options, where="backbone", prefix="backbone.options")
    if spec.pretrained:
        raise UserError(
            f"no hub has weights of {spec.name}: `pretrained: true` cannot fetch them",
            where="backbone",
            mend=f"set `weights:` (--set backbone.weights=path) to {_SOURCE}, or train from "
            "scratch with `pretrained: false`",
        )
    freeze = options.freeze
    if freeze is None:
        freeze = file is not None or spec.norm == "frozen"
    network = ResNet38(options.width, options.dropout, freeze)
    if file is not None:
        _load(network, file)
    return network


def _load(network: ResNet38, file: Path) -> None:
    own = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    if file.suffix == ".params":
        given = _published(read_params(file), list(own), file)
    else:
        try:
            given = load_state_dict(str(file), weights_only=True)
        except Exception as error:  # torch, pickle and safetensors raise many kinds here
            raise _misfit(
                file, (str(error).strip() or type(error).__name__).splitlines()[0]
            ) from None
    for key, tensor in own.items():
        found = given.get(key)
        if not isinstance(found, Tensor):
            raise _misfit(file, f"the tensor {key} is missing")
        if found.shape != tensor.shape:
            raise _misfit(file, f"{key} has shape {tuple(found.shape)}, not {tuple(tensor.shape)}")
    require_finite({key: given[key] for key in own}, file)
    network.load_state_dict({key: given[key] for key in own}, strict=False)


def _published(arrays: Mapping, keys: Sequence[str], file: Path) -> dict[str, Tensor]:
    """Our names for the arrays of the MXNet file; whatever else it holds is refused."""
    names = {key: _mxnet_name(key) for key in keys}
    known = set(names.values())
    for name in arrays:
        if name not in known and not name.split(":")[-1].startswith("linear1000_"):
            raise _misfit(file, f"it holds the unknown array {name}")
    for name in names.values():
        if name not in arrays:
            raise _misfit(file, f"the array {name} is missing")
    return {key: torch.from_numpy(arrays[name]) for key, name in names.items()}


def _mxnet_name(key: str) -> str:
    """``b4_1.conv_branch2a.weight`` is ``arg:res4b1_branch2a_weight`` there, and so on."""
    *unit, layer, kind = key.split(".")
    is_norm = layer.startswith("bn")
    if unit:
        stage, _, number = unit[0].removeprefix("b").partition("_")
        branch = layer.split("_")[1]
        layer = f"{'bn' if is_norm else 'res'}{stage}{f'b{number}' if number else 'a'}_{branch}"
    return _NORM[kind].format(layer) if is_norm else f"arg:{layer}_weight"


def _misfit(file: Path, reason: str) -> UserError:
    return UserError(
        f"the weights do not fit resnet38: {reason}",
        where=file,
        mend=f"give {_SOURCE}, or a .safetensors or .pth file of exactly this network",
    )
