"""Optimisers and schedules from plain settings."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from weakseg.errors import UserError
from weakseg.networks.backbone import Backbone
from weakseg.training.config import TrainConfig

__all__ = ["learning_rate", "make_optimiser"]

_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.GroupNorm)


def make_optimiser(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    config: TrainConfig,
    section: str = "train",
) -> torch.optim.Optimizer:
    """An optimiser whose groups differ in learning rate and decay, as the settings say.

    Where the model has a pretrained backbone, new layers (all that lie outside of one, or
    transposed convolutions alone) learn ``head_lr`` times faster, and biases ``bias_lr`` times
    faster than the weights of their layer. A bias is a parameter whose own name does not hold
    "weight". ``decayed`` and ``trained`` say what is decayed and what is left as it is. Each group
    keeps ``factor``, which the schedule multiplies with.

    Args:
        model: Holds the parameters.
        parameters: Those that may be trained; frozen ones among them stay out.
        config: Settings of the training.
        section: Section of the recipe that ``config`` is, for errors.

    Raises:
        UserError: Nothing is left to train.
    """
    owners = {
        id(p): (module, name)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
    }
    pretrained = {
        id(p)
        for module in model.modules()
        if isinstance(module, Backbone) and not module.from_scratch
        for p in module.parameters()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in parameters:
        module, name = owners[id(p)]
        if not p.requires_grad or (
            config.trained == "convolutions" and not isinstance(module, _CONVOLUTIONS)
        ):
            continue
        transposed = isinstance(module, _TRANSPOSED)
        new = id(p) not in pretrained if config.head_layers == "new" else transposed
        is_weight = "weight" in name
        factor = (config.head_lr if pretrained and new else 1.0) * (
            1.0 if is_weight else config.bias_lr
        )
        decayed = {"matrices": p.ndim > 1, "weights": is_weight, "all": True}[config.decayed]
        decay = config.weight_decay if decayed else 0.0
        groups.setdefault((factor, decay), []).append(p)
    if not groups:
        raise UserError(
            "there is nothing to train: no convolution and no GroupNorm is free to learn"
            if config.trained == "convolutions"
            else "there is nothing to train: all parameters are frozen",
            where=f"{section}.trained",
            mend=f"set {section}.trained: all, or let layers of the backbone learn",
        )
    described = [
        {"params": ps, "factor": factor, "lr": config.lr * factor, "weight_decay": decay}
        for (factor, decay), ps in groups.items()
    ]
    if config.optimiser == "adamw":
        return torch.optim.AdamW(described, lr=config.lr)
    nesterov = config.nesterov and config.momentum > 0  # without momentum there is no difference
    return torch.optim.SGD(described, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate at ``progress`` in [0, 1) of the schedule, before the groups' factors."""
    if progress < config.warmup:
        return config.lr * min(1.0, max(progress, 1e-3) / config.warmup)
    left = 1 - (progress - config.warmup) / (1 - config.warmup)
    if config.schedule == "poly":
        return config.lr * left**config.power
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return config.lr
