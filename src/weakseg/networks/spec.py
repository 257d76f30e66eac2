"""Which backbone to build: plain settings, so that reading a recipe does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from weakseg.config import Channels, Count, Frozen

__all__ = ["BackboneSpec", "Projection"]

_NAME = re.compile(r"(?:torchvision/)?\w+(?:\.[\w.-]+)?", re.ASCII)
_WORDS = {"pretrained", "checkpoint", "weights", "file", "url", "hub", "cache"}
"""Words in names of arguments with which timm and torchvision open files or the network."""

_HARMLESS = {"pretrained_window_size", "pretrained_window_sizes", "use_checkpoint"}
_OURS = {"num_classes", "features_only", "progress"}  # arguments that the backbone gives itself
_PATH = re.compile(
    r"[/\\:]|^~|\.(?:pth?|bin|ckpt|npz|npy|pkl|tar|params|safetensors|json|ya?ml)$", re.I
)


class BackboneSpec(Frozen):
    """A timm or torchvision network or ``resnet38``, its weights, and how coarse its last level is.

    timm differs from the papers without saying so; the fields state what is built: the papers'
    CAM networks *remove* the stride of the last stage (``dilate: false``), timm's own
    ``output_stride`` dilates it as well.
    """

    name: str = Field(
        "resnet50.tv_in1k",
        description="timm name, the part after the dot is the weights tag; torchvision/NAME; "
        "or resnet38",
    )
    pretrained: bool = Field(True, description="fetch the tagged weights from timm's hub")
    weights: Path | None = Field(
        None,
        description="local .safetensors or .pth file of that network; resnet38: .params too",
    )
    output_stride: Literal[4, 8, 14, 16, 32] = Field(
        16, description="stride of the last level in pixels; of a transformer: its patch"
    )
    dilate: bool = Field(
        False, description="dilate where stride is removed, as segmentation networks do"
    )
    norm: Literal["auto", "frozen", "affine", "trained"] = Field(
        "auto",
        description="BatchNorm of the backbone; auto = frozen with given weights, else trained; "
        "affine = its statistics stay, scale and shift learn (irn)",
    )
    train: Literal["all", "none"] | Count = Field(
        "all",
        description="what of it learns: all, none (its features are computed once), or a number of "
        "deepest levels",
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="RGB mean; null = that of the weights"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        None, description="RGB std; null = that of the weights"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="more arguments of the network, as timm, torchvision or resnet38 take them",
    )

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        """timm would take ``hf-hub:owner/name`` and ``local-dir:path`` too, with code of others."""
        if not _NAME.fullmatch(name):
            raise ValueError("is no name of a network of timm or torchvision, and no resnet38")
        return name

    @field_validator("options")
    @classmethod
    def _options_open_nothing(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in _leaves(options):
            words = set(re.split(r"[^a-z]+", key.rpartition(".")[2].lower()))
            if key in _OURS or (words & _WORDS and key not in _HARMLESS):
                raise ValueError(
                    f"{key} is no option: a network's weights come from `weights: file` or "
                    "`pretrained: true` alone, and its outputs are settled here"
                )
            if isinstance(value, str) and _PATH.search(value):
                raise ValueError(
                    f"{key} = {value!r:.80} names a file or an address, and options open none: "
                    "weights come from `weights: file` or `pretrained: true` alone"
                )
        return options

    @model_validator(mode="before")
    @classmethod
    def _weights_win(cls, values: Any) -> Any:
        """A weights file is meant to be used: it turns ``pretrained`` off unless both were asked for."""
        if isinstance(values, dict) and values.get("weights"):
            if values.get("pretrained"):
                raise ValueError("give either `weights: file` or `pretrained: true`, not both")
            values = {**values, "pretrained": False}
        return values

    @model_validator(mode="after")
    def _what_is_frozen_has_weights(self) -> Any:
        if self.train == "none" and self.norm in ("affine", "trained"):
            raise ValueError(f"norm: {self.norm} contradicts train: none")
        return self

    @property
    def is_frozen(self) -> bool:
        """True where nothing of the network learns."""
        return self.train == "none"

    @property
    def from_scratch(self) -> bool:
        """True where the network starts from random weights."""
        return not self.pretrained and self.weights is None

    @property
    def resolved_norm(self) -> Literal["frozen", "affine", "trained"]:
        """``norm``, with what ``auto`` stands for."""
        if self.norm == "auto":
            return "frozen" if self.is_frozen or not self.from_scratch else "trained"
        return self.norm

    @property
    def norm_is_frozen(self) -> bool:
        """True where the backbone's BatchNorm keeps its statistics and affine parameters."""
        return self.resolved_norm == "frozen"


class Projection(Frozen):
    """How a given classifier's outputs become maps of classes; written into model folders.

    Attributes:
        outputs: Number of its outputs, N.
        channels: Of the features that its linear layer reads.
        classes: For each of the K classes the outputs, counted from 0, that stand for it.
        loss: What its outputs were trained with: ``softmax`` = one class in each image.
        neck: Modules of the network between the backbone's last level and the pooling.
    """

    outputs: int = Field(ge=1, le=100_000)
    channels: Channels
    classes: tuple[tuple[int, ...], ...]
    loss: Literal["softmax", "sigmoid"]
    neck: tuple[str, ...] = ()


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested settings in dotted form, with what stands there."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            path = f"{key}.{name}" if key else str(name)
            yield path, inner
            yield from _leaves(inner, path)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield key, inner
            yield from _leaves(inner, key)
