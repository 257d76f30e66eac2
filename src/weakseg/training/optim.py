"""Optimisers and schedules from plain settings."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from weakseg.networks.backbone import Backbone
from weakseg.training.config import TrainConfig

__all__ = ["learning_rate", "make_optimiser"]


def make_optimiser(
    model: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """An optimiser whose groups are pretrained or new, decayed or not.

    New layers (all that lie outside a pretrained backbone) learn ``head_lr`` times faster;
    biases and normalisation (one-dimensional parameters) are not decayed. Each group keeps
    ``factor``, which the schedule multiplies with.
    """
    pretrained = {
        id(p)
        for module in model.modules()
        if isinstance(module, Backbone) and not module.from_scratch
        for p in module.parameters()
    }
    any_pretrained = bool(pretrained)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in parameters:
        if not p.requires_grad:
            continue
        factor = config.head_lr if any_pretrained and id(p) not in pretrained else 1.0
        groups.setdefault((factor, config.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    described = [
        {"params": ps, "factor": factor, "lr": config.lr * factor, "weight_decay": decay}
        for (factor, decay), ps in groups.items()
    ]
    if config.optimiser == "adamw":
        return torch.optim.AdamW(described, lr=config.lr)
    return torch.optim.SGD(described, lr=config.lr, momentum=config.momentum)


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
