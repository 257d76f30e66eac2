"""Backbones behind one contract: named levels with stated stride, channels and dilation.

They are timm's networks by their names there, torchvision's (``networks/vision.py``), and resnet38,
which timm lacks. Vision transformers give maps of their patch tokens (``networks/tokens.py``).

Four silent differences between timm and the papers are settled here: ``output_stride`` dilates in
timm while the papers only remove the stride; timm's first ResNet feature lies before the max-pool
(stride 2) while the papers' C1 lies after it (stride 4); weights are named by their tag; and the
normalisation that the weights expect travels with the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import load_state_dict, model_entrypoint
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.networks.cells import cells_of, pads_by_size
from weakseg.networks.checkpoint import require_finite
from weakseg.networks.packaged import packaged_weights
from weakseg.networks.resnet38 import ResNet38, create_resnet38
from weakseg.networks.spec import BackboneSpec
from weakseg.networks.tokens import VisionTokens, create_tokens, is_transformer
from weakseg.networks.vision import PREFIX, create_torchvision, in_torchvision
from weakseg.ops.cells import Cells
from weakseg.registry import suggest

__all__ = [
    "Backbone",
    "Level",
    "MakeBackbone",
    "backbone_factory",
    "has_last_convolution",
    "make_backbone",
    "require_known",
    "weights_from",
    "with_last_convolution",
]

_OWN = {"resnet38": create_resnet38}  # networks that timm lacks
_PROBE = 256  # side of the image that strides are measured on; a multiple of every stride

logging.getLogger("timm").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Level:
    """One feature level: ``name`` (C1 is the finest), ``channels``, and ``stride`` in pixels."""

    name: str
    channels: int
    stride: int


class Backbone(nn.Module):
    """A network that returns its feature levels, finest first.

    Attributes:
        levels: What ``forward`` returns, in order.
        mean: RGB mean that inputs in [0, 1] are normalised with.
        std: RGB standard deviation, likewise.
        from_scratch: True where the weights are random.
        weights_from: Where its weights came from, in words.
        padded_by_size: Where its cells lie depends on the size of the image (TensorFlow's padding).
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.network = _create(spec)
        self.levels = _settle_levels(self.network, spec)
        stride = self.levels[-1].stride
        if stride != spec.output_stride:
            settable = stride in get_args(type(spec).model_fields["output_stride"].annotation)
            raise UserError(
                f"output_stride {spec.output_stride} was asked for, but {spec.name} gives {stride}",
                where="backbone",
                mend=f"set output_stride: {stride}, or take another backbone"
                if settable
                else "take another backbone",
            )
        cfg = getattr(self.network, "pretrained_cfg", None) or getattr(
            self.network, "default_cfg", {}
        )
        self.mean = tuple(spec.mean or cfg.get("mean", (0.485, 0.456, 0.406)))
        self.std = tuple(spec.std or cfg.get("std", (0.229, 0.224, 0.225)))
        self.from_scratch = spec.from_scratch
        self.weights_from = weights_from(spec)
        self.padded_by_size = pads_by_size(self.network)
        self._cells: dict[tuple[int, int], tuple[Cells, ...]] = {}
        if not isinstance(self.network, VisionTokens):
            self._cells[0, 0] = cells_of(self.network, (4 * stride, 4 * stride))
        if spec.norm_is_frozen:
            for norm in self._norms():
                norm.requires_grad_(False)
        for parameter in self._kept():
            parameter.requires_grad_(False)
        self._given: list[Tensor] | None = None
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of ``images`` (B, 3, H, W), normalised: one (B, C, h, w) per level."""
        if self._given is not None:
            return self._given
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.spec.is_frozen):
            return list(self.network(images))

    @contextmanager
    def giving(self, levels: list[Tensor]) -> Iterator[None]:
        """Answers with levels that were computed before, whatever the images."""
        self._given = levels
        try:
            yield
        finally:
            self._given = None

    def cells(self, size: tuple[int, int]) -> tuple[Cells, ...]:
        """Where the cells of each level lie in an image of ``size`` (H, W), finest level first.

        While a network is traced with its size left open, they are those of images of whole cells.
        """
        if isinstance(self.network, VisionTokens):
            return self.network.cells(size)
        if not self.padded_by_size or not all(isinstance(side, int) for side in size):
            return self._cells[0, 0]
        stride = max(level.stride for level in self.levels)
        rest = (size[0] % stride, size[1] % stride)
        if rest not in self._cells:
            self._cells[rest] = cells_of(self.network, (rest[0] + 4 * stride, rest[1] + 4 * stride))
        return self._cells[rest]

    def pictures(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """RGB in [0, 1], (B, 3, h, w) of that size, of normalised images (B, 3, H, W)."""
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std)
        )
        rgb = (images.float() * std + mean).clamp(0, 1)
        return rgb if rgb.shape[-2:] == size else F.adaptive_avg_pool2d(rgb, size)

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.spec.is_frozen:
            self.network.eval()
        if self.spec.resolved_norm != "trained":
            for norm in self._norms():
                norm.eval()
        return self

    def _kept(self) -> list[nn.Parameter]:
        """Parameters that do not learn: all, or those that a level reads above the deepest ones."""
        own = list(self.network.parameters())
        if self.spec.train == "all":
            return []
        if self.spec.train == "none" or not own:
            return own
        shallow = len(self.levels) - self.spec.train
        if shallow <= 0:
            return []
        mode = self.network.training
        self.network.eval()
        side = 2 * max(level.stride for level in self.levels)
        with torch.enable_grad():
            level = self.network(torch.zeros(1, 3, side, side))[shallow - 1]
            learning = [p for p in own if p.requires_grad]
            found = torch.autograd.grad(level.sum(), learning, allow_unused=True)
        self.network.train(mode)
        return [p for p, gradient in zip(learning, found, strict=True) if gradient is not None]

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


MakeBackbone = Callable[[], Backbone]
"""What a method gets: it may build as many trunks as it needs."""


def make_backbone(spec: BackboneSpec) -> Backbone:
    """Builds the backbone and loads its weights.

    Raises:
        UserError: The name is unknown, the weights cannot be fetched or do not fit, or the
            output stride cannot be had.
    """
    return Backbone(spec)


def weights_from(spec: BackboneSpec) -> str:
    """Where the weights of a backbone come from: a file, an installed package, or a hub."""
    if spec.weights is not None:
        return str(spec.weights)
    if not spec.pretrained:
        return "random"
    packaged = packaged_weights(spec.name)
    if packaged is not None:
        return f"the package {packaged.package}"
    return "torchvision's hub" if in_torchvision(spec.name) else "timm's hub"


def backbone_factory(spec: BackboneSpec) -> MakeBackbone:
    """A function that builds a fresh backbone at every call."""
    return lambda: make_backbone(spec)


def require_known(spec: BackboneSpec) -> None:
    """Refuses names of no network.

    Raises:
        UserError: With the nearest names.
    """
    name = spec.name.split(".")[0]
    if in_torchvision(spec.name):
        valid = [PREFIX + n for n in torchvision.models.list_models(module=torchvision.models)]
        known = name in valid
    else:
        valid = [*timm.list_models(), *_OWN]
        known = spec.name in _OWN or timm.is_model(name)
    if not known:
        raise UserError(
            f"unknown backbone {spec.name!r}", where="backbone.name", mend=suggest(name, valid)
        )


def _create(spec: BackboneSpec) -> nn.Module:
    require_known(spec)
    name = spec.name.split(".")[0]
    file = None if spec.weights is None else _existing(spec.weights)
    if spec.name in _OWN:
        return _OWN[spec.name](spec, file)
    if is_transformer(name) or in_torchvision(name):
        create = create_torchvision if in_torchvision(name) else create_tokens
        try:
            return create(spec, file)
        except UserError:
            raise
        except Exception as error:  # timm, huggingface_hub and torch raise many kinds here
            raise _explain(spec, error) from error
    arguments = dict(spec.options)
    if spec.dilate:
        arguments["output_stride"] = spec.output_stride
    try:
        network = _from_timm(spec, file, arguments)
    except UserError:
        raise
    except Exception as error:  # timm, huggingface_hub and torch raise many kinds here
        raise _explain(spec, error) from error
    _move_first_level_behind_pool(network)
    return network


def _from_timm(spec: BackboneSpec, file: Path | None, arguments: dict[str, Any]) -> nn.Module:
    """timm's network of feature levels, with the weights that ``spec`` asks for."""
    packaged = packaged_weights(spec.name) if spec.pretrained and file is None else None
    loading: dict[str, Any] = {}
    given: list[str] = []
    if file is not None:
        state = load_state_dict(str(file), weights_only=True)
        require_finite(state, file)
        given = list(state)
        loading["pretrained_cfg_overlay"] = {"file": str(file)}
    if file is not None or (spec.pretrained and packaged is None):
        loading["pretrained"] = True
    if not has_last_convolution(spec.name):
        network = timm.create_model(spec.name, features_only=True, **arguments, **loading)
        if file is not None:
            _check_that_weights_fit(network, given, spec)
        return network
    whole = timm.create_model(spec.name, num_classes=0, **arguments, **loading)
    if file is not None:
        _check_that_weights_fit(whole, given, spec)
    if packaged is not None:
        whole.load_state_dict(packaged.state(whole), strict=False)
    network = timm.create_model(spec.name, features_only=True, **arguments)
    return with_last_convolution(network, whole)


def has_last_convolution(name: str) -> bool:
    """Whether timm's network has a convolution between its last level and the pooling.

    EfficientNet, MobileNetV2 and the like end in a narrow linear bottleneck, which a last 1 x 1
    convolution widens for the classifier.
    """
    plain = name.partition(".")[0]
    return timm.is_model(plain) and model_entrypoint(plain).__module__.endswith(".efficientnet")


def with_last_convolution(network: nn.Module, whole: nn.Module) -> nn.Module:
    """A network of feature levels whose last one is what the classifier of ``whole`` pools.

    Args:
        network: timm's feature network of the same name and options.
        whole: The classifier; its weights are taken over.
    """
    if not isinstance(network, EfficientNetFeatures) or not hasattr(whole, "conv_head"):
        raise ValueError(f"{type(whole).__name__} has no last convolution")
    network.__class__ = _WholeEfficientNet
    network.conv_head, network.bn2 = whole.conv_head, whole.bn2
    weights = whole.state_dict()
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    return network


class _WholeEfficientNet(EfficientNetFeatures):
    """timm's feature network with the convolution that its classifier reads, under timm's names."""

    conv_head: nn.Module
    bn2: nn.Module

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature levels (B, C, h, w), finest first."""
        levels = super().forward(x)
        return [*levels[:-1], self.bn2(self.conv_head(levels[-1]))]


def _check_that_weights_fit(network: nn.Module, given: list[str], spec: BackboneSpec) -> None:
    """timm loads feature networks leniently: a file of another network would pass unnoticed."""
    there = {_flat(key) for key in given}
    own = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    missing = [key for key in own if _flat(key) not in there]
    if missing:
        raise _explain(
            spec,
            ValueError(f"{len(missing)} of {len(own)} tensors are missing, such as {missing[0]}"),
        )


def _flat(key: str) -> str:
    return key.replace(".", "_")  # feature networks write stages_0 for the file's stages.0


def _existing(path: Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(
            f"no file {str(path)!r}",
            where="backbone.weights",
            mend="give the path of a .safetensors or .pth file",
        )
    return path


def _explain(spec: BackboneSpec, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if spec.weights is not None:
        return UserError(
            f"the weights do not fit {spec.name}: {reason}",
            where=spec.weights,
            mend="give the file of exactly this network, or name the network it belongs to",
        )
    if spec.pretrained:
        return UserError(
            f"the weights of {spec.name} cannot be fetched or do not exist: {reason}",
            where="backbone",
            mend="without network access give a file with `weights: path.safetensors` "
            "(--set backbone.weights=path), or train from scratch with `pretrained: false`",
        )
    return UserError(
        f"{spec.name} cannot be built: {reason}",
        where="backbone",
        mend="choose a network that gives feature maps, or correct backbone.options",
    )


def _move_first_level_behind_pool(network: nn.Module) -> None:
    """Taps a ResNet's first level after the max-pool, as the papers' C1."""
    layers = getattr(network, "return_layers", None)
    if layers is None or "maxpool" not in dict(network.named_children()):
        return
    first = next(iter(layers))
    if not first.startswith("layer"):
        layers["maxpool"] = layers.pop(first)
        for name in [n for n in layers if n != "maxpool"]:
            layers[name] = layers.pop(name)  # keep the order of the levels


def _remove_strides(network: nn.Module, spec: BackboneSpec) -> None:
    """Sets to 1 every stride that would make the map coarser than the output stride."""
    sizes: dict[nn.Module, int] = {}
    hooks = [
        m.register_forward_hook(lambda m, _, out: sizes.__setitem__(m, out.shape[-1]))
        for m in network.modules()
        if _stride(m) > 1 and not list(m.children())
    ]
    try:
        _probe(network)
    finally:
        for hook in hooks:
            hook.remove()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in sizes and _PROBE // sizes[child] > spec.output_stride:
                setattr(parent, name, _without_stride(child, spec))


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, tuple) else stride if isinstance(stride, int) else 1


def _without_stride(module: nn.Module, spec: BackboneSpec) -> nn.Module:
    if isinstance(module, nn.Conv2d) and all(k % 2 for k in module.kernel_size):
        module.stride = (1, 1)
        return module
    if isinstance(module, nn.AvgPool2d):
        if module.kernel_size in (2, (2, 2)):
            return nn.Identity()
        module.stride = 1
        return module
    raise UserError(
        f"{spec.name} reduces its map with {type(module).__name__}, whose stride cannot be removed",
        where="backbone.output_stride",
        mend="set output_stride: 32, or dilate: true where timm supports it, or take a ResNet",
    )


def _settle_levels(network: nn.Module, spec: BackboneSpec) -> tuple[Level, ...]:
    """The levels, once strides are removed where that is asked for."""
    if isinstance(
        network, (ResNet38, VisionTokens)
    ):  # they state them, and have no stride to spare
        found = network.levels
    else:
        if not spec.dilate:
            _remove_strides(network, spec)
        found = tuple((x.shape[1], round(_PROBE / x.shape[-1])) for x in _probe(network))
    return tuple(Level(f"C{i}", *level) for i, level in enumerate(found, 1))


def _probe(network: nn.Module) -> list[Tensor]:
    training = network.training
    network.eval()
    with torch.no_grad():
        levels = list(network(torch.zeros(1, 3, _PROBE, _PROBE)))
    network.train(training)
    return levels
