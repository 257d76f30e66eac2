"""Settings of one training: plain, so that reading a recipe does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from weakseg.config import Frozen

__all__ = ["PAPER_OPTIMISER", "TrainConfig"]

PAPER_OPTIMISER: dict[str, Any] = {
    "optimiser": "sgd",
    "lr": 0.1,
    "weight_decay": 1e-4,
    "momentum": 1e-4,  # the published subclass passed weight decay where SGD expects momentum
    "head_lr": 10.0,
    "schedule": "poly",
    "power": 0.9,
    "warmup": 0.0,
}
"""What the published CAM code (irn, and psa before it) really ran: SGD practically without momentum."""


class TrainConfig(Frozen):
    """Crops, schedule and optimiser.

    ``preset: paper`` sets the optimiser of the published CAM code; keys given beside it win.
    """

    preset: Literal["default", "paper"] = Field(
        "default", description="paper = published optimiser, practically without momentum"
    )
    steps: PositiveInt | None = Field(None, description="optimiser steps; overrides epochs")
    epochs: PositiveFloat = Field(
        10.0, description="passes over the images, where steps is not given"
    )
    batch: PositiveInt = Field(16, description="images in an optimiser step, over all devices")
    accumulate: PositiveInt = Field(
        1, description="parts a batch is cut into, one after the other, to save memory"
    )
    crop: PositiveInt = Field(224, description="side of the square crop in pixels")
    resize: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.625, 1.25),
        description="range of the longer side before the crop, as a share of the crop",
    )
    flip: bool = Field(True, description="mirror half of the images")
    jitter: float = Field(
        0.0, ge=0, le=1, description="strength of colour jitter; 0 = off, papers use .3"
    )
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = Field(0.01, description="learning rate of pretrained weights")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    weight_decay: float = Field(1e-4, ge=0)
    head_lr: PositiveFloat = Field(
        10.0, description="factor on lr for layers that start from random weights"
    )
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: PositiveFloat = Field(0.9, description="exponent of poly")
    warmup: float = Field(
        0.0, ge=0, lt=1, description="share of the schedule with linearly rising lr"
    )
    clip: PositiveFloat | None = Field(None, description="largest norm of the gradient of a phase")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of averaged weights, used after training"
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    init_from: Path | None = Field(
        None, description="model or run folder whose weights to start from"
    )
    checkpoint_every: PositiveInt = Field(100, description="steps between checkpoints for resuming")
    snapshot_every: PositiveInt | None = Field(
        None, description="steps between copies of the weights to look back at; null = none kept"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "paper":
            return {**PAPER_OPTIMISER, **values}
        return values

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
