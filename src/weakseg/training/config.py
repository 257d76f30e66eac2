"""Settings of one training: plain, so that reading a recipe does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from weakseg.config import Frozen, Images, Pixels, Scale, Steps

__all__ = ["PAPERS", "PRESETS", "Precision", "TrainConfig", "without_preset"]

_SGD: dict[str, Any] = {
    "optimiser": "sgd",
    "nesterov": False,
    "bias_lr": 1.0,
    "trained": "all",
    "decayed": "weights",
    "head_lr": 10.0,
    "head_layers": "new",
    "schedule": "poly",
    "power": 0.9,
    "warmup": 0.0,
}
_PSA: dict[str, Any] = _SGD | {
    "lr": 0.1,
    "weight_decay": 5e-4,
    "bias_lr": 2.0,
    "trained": "convolutions",
    "head_init": "xavier",
}

PRESETS: dict[str, dict[str, Any]] = {
    "puzzle": _SGD
    | {
        "lr": 0.1,
        "weight_decay": 1e-4,
        "nesterov": True,
        "bias_lr": 2.0,
        "head_init": "kaiming",
    },
    "psa": _PSA,
    "acr": _PSA | {"lr": 0.01, "head_layers": "transposed"},
    "irn": _SGD | {"lr": 0.1, "weight_decay": 1e-4, "decayed": "all", "head_init": "default"},
    "mctformer": {
        "optimiser": "adamw",
        "weight_decay": 0.05,
        "bias_lr": 1.0,
        "trained": "all",
        "decayed": "matrices",
        "head_lr": 1.0,
        "head_layers": "new",
        "head_init": "default",
        "schedule": "cosine",
    },
}
"""What the published codes of each family ran; keys given beside a preset win.

Of the SGD families ``momentum`` is the weight decay, unless it is given: their subclass of SGD hands
the decay over where SGD expects the momentum, so that they train practically without any.
Of ``mctformer``, ``lr`` grows with the batch, 5e-4 for 512 images, and ``warmup`` is 5 epochs.
"""

PAPERS: dict[str, dict[str, Any]] = {
    "cam": {"preset": "irn"},
    "puzzle": {"preset": "puzzle"},
    "seam": {"preset": "psa", "lr": 0.01},
    "acr": {"preset": "acr"},
    "acr+vit": {"preset": "mctformer"},  # nothing was published of it: as its classifier's
    "mctformer": {"preset": "mctformer"},
    "recurseed": {"preset": "puzzle"},  # nothing was published of it: the authors' code before it
}
"""What ``preset: paper`` stands for, by the method's name (here, so that no torch is imported)."""

_WARMUP_EPOCHS, _EPOCHS = 5, 60  # of MCTformer
_PRESET_KEYS = {"momentum"}.union(*PRESETS.values())


def without_preset(train: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training less those that presets set, so that another preset can set them."""
    return {key: value for key, value in train.items() if key not in _PRESET_KEYS}


Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
"""Numbers that networks compute with; losses and operators stay in float32."""


class TrainConfig(Frozen):
    """Crops, schedule and optimiser.

    ``preset`` sets the optimiser of a published code, its groups of parameters and its heads' first
    weights; keys given beside it win. ``paper`` is the one of the method's paper.
    """

    preset: Literal["default", "paper", "puzzle", "psa", "acr", "irn", "mctformer"] = Field(
        "default",
        description="optimiser of a published code; psa = SEAM's too; paper = that of the method's",
    )
    steps: Steps | None = Field(None, description="optimiser steps; overrides epochs")
    epochs: PositiveFloat = Field(
        10.0, le=1_000_000, description="passes over the images, where steps is not given"
    )
    batch: Images = Field(16, description="images in an optimiser step, over all devices")
    accumulate: Images = Field(
        1, description="parts a batch is cut into, one after the other, to save memory"
    )
    crop: Pixels = Field(224, description="side of the square crop in pixels")
    resize: tuple[Scale, Scale] = Field(
        (0.625, 1.25),
        description="range of the longer side before the crop, as a share of the crop",
    )
    flip: bool = Field(True, description="mirror half of the images")
    jitter: float = Field(
        0.0, ge=0, le=1, description="strength of colour jitter; 0 = off, papers use .3"
    )
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = Field(0.01, description="learning rate of pretrained weights")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of SGD; published codes really had their weight decay here"
    )
    nesterov: bool = Field(False, description="SGD with Nesterov's momentum")
    weight_decay: float = Field(1e-4, ge=0)
    decayed: Literal["matrices", "weights", "all"] = Field(
        "matrices",
        description="what is decayed: matrices = neither biases nor normalisation; weights = "
        "whatever is named so, that of normalisation too",
    )
    trained: Literal["all", "convolutions"] = Field(
        "all", description="convolutions = nothing but those and GroupNorm"
    )
    head_lr: PositiveFloat = Field(
        10.0, description="factor on lr for layers that start from random weights"
    )
    head_layers: Literal["new", "transposed"] = Field(
        "new",
        description="which those are: new = all but a pretrained backbone's; transposed = "
        "transposed convolutions alone (ACR)",
    )
    head_init: Literal["default", "kaiming", "xavier"] = Field(
        "default", description="first weights of the head that gives the maps; default = PyTorch's"
    )
    bias_lr: PositiveFloat = Field(1.0, description="factor on lr for biases, of new layers too")
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: PositiveFloat = Field(0.9, description="exponent of poly")
    warmup: float = Field(
        0.0, ge=0, lt=1, description="share of the schedule with linearly rising lr"
    )
    clip: PositiveFloat | None = Field(None, description="largest norm of the gradient of a phase")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of averaged weights, used after training"
    )
    precision: Precision = Field(
        "32-true", description="auto = the faster one of float32 and bfloat16, measured once"
    )
    features_gb: float = Field(
        20.0,
        ge=0,
        description="disk space for the maps of a frozen backbone; where they take more, they are "
        "computed twice",
    )
    init_from: Path | None = Field(
        None, description="model or run folder whose weights to start from"
    )
    checkpoint_every: Steps = Field(100, description="steps between checkpoints for resuming")
    snapshot_every: Steps | None = Field(
        None, description="steps between copies of the weights to look back at; null = none kept"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, Mapping) else None
        if preset == "paper":
            raise ValueError(
                "preset paper stands for the optimiser of the method's paper, and this is no training "
                f"of a method that has one: name it ({', '.join(PRESETS)}) or leave it out"
            )
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        found = PRESETS[preset] | dict(values)
        if found["optimiser"] == "sgd":
            return {"momentum": found["weight_decay"]} | found
        return cls._scaled(found) if preset == "mctformer" else found

    @classmethod
    def _scaled(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Learning rate in proportion to the batch, and 5 epochs of warm-up, half of all at most."""

        def number(key: str) -> float:
            try:
                return float(values[key])
            except (KeyError, TypeError, ValueError):  # left out, or wrong: it has its own error
                return float(cls.model_fields[key].default)

        epochs = number("epochs") if values.get("steps") is None else _EPOCHS
        scaled = {
            "lr": 5e-4 * number("batch") / 512,
            "warmup": _WARMUP_EPOCHS / max(epochs, 2 * _WARMUP_EPOCHS),
        }
        return scaled | values

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.resize[0] > self.resize[1]:
            raise ValueError(f"resize {self.resize} must be (smallest, largest)")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch {self.batch} must be a multiple of accumulate {self.accumulate}"
            )
        return self

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the whole schedule for a collection of this many images."""
        return self.steps or max(1, round(self.epochs * images / self.batch))
