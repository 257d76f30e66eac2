"""A given classifier, taken apart for its class activation maps.

Zhou et al. (CVPR 2016, eq. 1 and 2): where a network pools its last features globally and a linear
layer reads them, the same layer applied at every position gives the maps, with no training. Here
any timm or torchvision network of that form becomes a backbone of ours (the part that its feature
levels need), a neck (what lies between them and the pooling, such as a last 1 x 1 convolution) and
the linear layer. That the form is there is not believed but tried: the average of the maps and the
bias must be what the network itself says of an image.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.networks.backbone import (
    Backbone,
    has_last_convolution,
    require_known,
    with_last_convolution,
)
from weakseg.networks.checkpoint import Checkpoint
from weakseg.networks.heads import ProjectedHead
from weakseg.networks.spec import BackboneSpec
from weakseg.networks.tokens import is_transformer
from weakseg.networks.vision import TorchvisionTrunk, build_torchvision, in_torchvision

__all__ = ["ClassifierParts", "classifier_neck", "take_apart"]

_TOLERANCE = 1e-4  # of the largest output
_SIDE = 128
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")
_AUXILIARY = ("aux", "AuxLogits")
_NAME = (
    "name the network that it belongs to: --set backbone.name=NAME, a timm name or torchvision/NAME"
)


@dataclass(frozen=True)
class ClassifierParts:
    """A classifier's weights by what they are.

    Attributes:
        backbone: Tensors of ``Backbone.network``.
        neck: Tensors of what ``classifier_neck`` builds.
        neck_names: Names of its modules in the whole network.
        weight: (N, C) of the linear layer.
        bias: (N,).
    """

    backbone: dict[str, Tensor]
    neck: dict[str, Tensor]
    neck_names: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    def load_into(self, backbone: Backbone, head: ProjectedHead) -> None:
        """Gives the weights to a backbone of the same network and a head of the same shape."""
        backbone.network.load_state_dict(self.backbone)
        head.neck.load_state_dict(self.neck)
        with torch.no_grad():
            head.classifier.weight.copy_(self.weight[:, :, None, None])
            head.bias.copy_(self.bias)


def take_apart(checkpoint: Checkpoint, spec: BackboneSpec) -> ClassifierParts:
    """The parts of a classifier with global average pooling and one linear layer behind it.

    Args:
        checkpoint: Its weights.
        spec: ``name`` and ``options`` say which network it is; strides are left as they are.

    Raises:
        UserError: The network has another form, or the weights are not that network's.
    """
    require_known(spec)
    _refuse_by_name(spec)
    try:
        linear = _linear_name(_build(spec, 2))
        whole = _loaded(checkpoint, spec, linear)
        trunk = _trunk(whole, spec)
    except UserError:
        raise
    except Exception as error:  # timm, torchvision and torch raise many kinds of their options
        raise _cannot_be_built(spec, error) from None
    names = tuple(_between(whole, trunk, linear))
    neck = _neck(whole, names)
    layer = whole.get_submodule(linear)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    bias = torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach()
    weight = layer.weight.detach().flatten(1)
    _require_the_form(whole, trunk, neck, weight, bias, names, linear, spec, checkpoint.file)
    return ClassifierParts(trunk.state_dict(), neck.state_dict(), names, weight, bias)


def classifier_neck(spec: BackboneSpec, names: tuple[str, ...]) -> nn.Sequential:
    """The modules of these names of the network that ``spec`` names, with random weights."""
    if not names:
        return nn.Sequential()
    try:
        return _neck(_build(spec, 1), names)
    except Exception as error:  # timm, torchvision and torch raise many kinds of their options
        raise _cannot_be_built(spec, error) from None


def _cannot_be_built(spec: BackboneSpec, error: Exception) -> UserError:
    reason = str(error).strip() or type(error).__name__
    return UserError(
        f"{spec.name} cannot be built as a classifier: {reason}",
        where="backbone",
        mend="correct backbone.name and backbone.options",
    )


def _refuse_by_name(spec: BackboneSpec) -> None:
    reason = ""
    if is_transformer(spec.name.split(".")[0]):
        reason = "is a transformer: its class comes from tokens that have seen the whole image"
    elif spec.name == "resnet38":
        reason = "is known here without a classifier"
    if reason:
        raise UserError(
            f"{spec.name} {reason}",
            where="backbone.name",
            mend="give a classifier with global average pooling and one linear layer, such as a "
            "resnet, densenet, regnet, mobilenetv2 or efficientnet",
        )


def _build(spec: BackboneSpec, outputs: int) -> nn.Module:
    if in_torchvision(spec.name):
        return build_torchvision(spec, num_classes=outputs).eval()
    return timm.create_model(spec.name, num_classes=outputs, **spec.options).eval()


def _linear_name(whole: nn.Module) -> str:
    """Name of the layer that gives the outputs."""
    get: Callable[[], nn.Module] | None = getattr(whole, "get_classifier", None)
    last = None if get is None else get()
    found = [
        name
        for name, m in whole.named_modules()
        if (m is last if last is not None else isinstance(m, nn.Linear))
        and (isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)))
    ]
    if not found:
        raise UserError(
            f"{type(whole).__name__} does not end in one linear layer",
            where="backbone.name",
            mend="give a classifier with global average pooling and one linear layer",
        )
    return found[-1]


def _loaded(checkpoint: Checkpoint, spec: BackboneSpec, linear: str) -> nn.Module:
    """The whole network with the file's weights and its number of outputs."""
    own = _build(spec, 2).state_dict()
    state = {_OLD_DENSENET.sub(r"\1", k): v for k, v in checkpoint.under(own).items()}
    weight, bias = _head_of(state, own, linear, checkpoint)
    whole = _build(spec, len(weight))
    layer = whole.get_submodule(linear)
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    if weight.flatten(1).shape[1] != shape[1]:
        raise _misfit(
            checkpoint,
            spec,
            f"its linear layer reads {weight.shape[1]} channels, that of {spec.name} {shape[1]}",
        )
    body = OrderedDict(
        (k, v) for k, v in state.items() if k in own and not k.startswith(linear + ".")
    )
    body._metadata = own._metadata  # type: ignore[attr-defined]  # some read a version there
    body[f"{linear}.weight"] = weight.reshape(shape)
    if f"{linear}.bias" in own:
        body[f"{linear}.bias"] = torch.zeros(len(weight)) if bias is None else bias
    try:
        missing = whole.load_state_dict(body, strict=False).missing_keys
    except RuntimeError as error:
        raise _misfit(checkpoint, spec, str(error).splitlines()[1].strip()) from None
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise _misfit(
            checkpoint,
            spec,
            f"{len(missing)} of {len(own)} tensors are missing, such as {missing[0]}",
        )
    top = linear.partition(".")[0]
    more = [k for k in state if k not in own and not k.startswith((top + ".", *_AUXILIARY))]
    more = [k for k in more if not k.endswith("num_batches_tracked")]
    if more:
        raise _misfit(
            checkpoint, spec, f"{len(more)} tensors have no place in it, such as {more[0]}"
        )
    return whole.eval()


def _head_of(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], linear: str, checkpoint: Checkpoint
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear layer, also where somebody has put it into a ``Sequential``."""
    if f"{linear}.weight" in state:
        return state[f"{linear}.weight"], state.get(f"{linear}.bias")
    top = linear.partition(".")[0]
    kept = {k for k in own if not k.startswith(linear + ".")}
    there = {k: v for k, v in state.items() if k.startswith(top + ".") and k not in kept}
    matrices = [k for k, v in there.items() if k.endswith("weight") and v.ndim >= 2]
    if len(matrices) == 1:
        base = matrices[0].removesuffix("weight")
        if set(there) <= {base + "weight", base + "bias"}:
            return there[base + "weight"], there.get(base + "bias")
    raise UserError(
        f"has no single linear layer {linear!r} behind the pooling"
        + (f", but {', '.join(sorted(there)[:6])}" if there else ""),
        where=checkpoint.file,
        mend="layers between cannot be projected back: train a head of one linear layer; or "
        + _NAME,
    )


def _misfit(checkpoint: Checkpoint, spec: BackboneSpec, reason: str) -> UserError:
    return UserError(
        f"the weights are not those of {spec.name}: {reason}", where=checkpoint.file, mend=_NAME
    )


def _trunk(whole: nn.Module, spec: BackboneSpec) -> nn.Module:
    """The network as a backbone builds it, at its own strides, with the weights of ``whole``."""
    if in_torchvision(spec.name):
        return TorchvisionTrunk(whole).eval()
    trunk = timm.create_model(spec.name, features_only=True, **spec.options).eval()
    if has_last_convolution(spec.name):
        return with_last_convolution(trunk, whole).eval()
    weights = {k.replace(".", "_"): v for k, v in whole.state_dict().items()}
    # Feature networks write stages_0 for stages.0.
    trunk.load_state_dict({k: weights[k.replace(".", "_")] for k in trunk.state_dict()})
    return trunk


def _between(whole: nn.Module, trunk: nn.Module, linear: str) -> Iterator[str]:
    """Outermost modules with weights that neither the trunk nor the linear layer has, in order."""
    flat = {k.replace(".", "_") for k in trunk.state_dict()}
    extra = {
        k
        for k in whole.state_dict()
        if k.replace(".", "_") not in flat and not k.startswith((linear + ".", *_AUXILIARY))
    }

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = prefix + name
            keys = {f"{path}.{k}" for k in child.state_dict()}
            if keys & extra:
                if keys <= extra:
                    yield path
                else:
                    yield from walk(child, path + ".")

    yield from walk(whole, "")


def _neck(whole: nn.Module, names: tuple[str, ...]) -> nn.Sequential:
    return nn.Sequential(*(whole.get_submodule(name) for name in names))


def _require_the_form(
    whole: nn.Module,
    trunk: nn.Module,
    neck: nn.Module,
    weight: Tensor,
    bias: Tensor,
    names: tuple[str, ...],
    linear: str,
    spec: BackboneSpec,
    file: Path,
) -> None:
    """Refuses a network whose outputs are not the average of its maps and a bias."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, _SIDE, _SIDE, generator=generator)
    with torch.inference_mode(), contextlib.suppress(RuntimeError, AssertionError, ValueError):
        outputs = whole(image)
        if not bool(outputs.isfinite().all()):
            raise UserError(
                "its outputs are no numbers: the weights are damaged", where=file, mend=_NAME
            )
        features = trunk(image)[-1]
        maps = nn.functional.conv2d(neck(features), weight[:, :, None, None])
        error = (maps.mean((2, 3)) + bias - outputs).abs().max()
        same = bool(error <= _TOLERANCE * outputs.abs().max().clamp(min=1e-3))
        if same and maps.shape[-2:] == features.shape[-2:]:
            return
    reason = "its outputs are no linear function of globally averaged maps"
    if names:
        kinds = [whole.get_submodule(name) for name in names]
        top = linear.partition(".")[0] + "."
        if any(
            "LayerNorm" in type(k).__name__ and name.startswith(top)
            for name, k in zip(names, kinds, strict=True)
        ):
            reason = f"it normalises after the pooling ({', '.join(names)}), which is not linear"
        else:
            reason = f"{', '.join(names)} between its maps and its outputs cannot be skipped"
    raise UserError(
        f"{spec.name} cannot be projected back: {reason}",
        where="method.from_classifier",
        mend="give a classifier with global average pooling and one linear layer behind it",
    )
