"""What a network needs of memory, before it takes it: the killer of processes explains nothing.

All numbers are lower bounds, measured on a small image: what exceeds the machine's memory by them
cannot be done. What stays below may still be too much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from weakseg.errors import UserError
from weakseg.memory import machine_memory
from weakseg.networks.backbone import Backbone
from weakseg.training.config import TrainConfig

__all__ = [
    "NARROWER",
    "WEIGHTS_IN_TRAINING",
    "inference_bytes",
    "require_fits",
    "require_step_fits",
    "training_bytes",
    "within_memory",
]

_SIDE = 128  # of the image that is measured on
_UNSUSPICIOUS = 16_384  # bytes for a pixel, several times what usual networks keep of it
_INPUT = 12  # bytes of an RGB pixel in float32

NARROWER = "choose a smaller network, or fewer channels in its layers"
"""What to do where a network is too large."""

WEIGHTS_IN_TRAINING = 3
"""How often weights are there in a training: they, their gradients, and the optimiser's memory."""


@contextmanager
def within_memory(where: object, mend: str, copies: int = 1) -> Iterator[None]:
    """Building a network stops before it takes more memory than there is.

    Weights are counted as layers register them. They are no memory yet: that comes as they are
    filled.

    Args:
        where: Recipe key or file that asked for the network.
        mend: What to do about it.
        copies: How often its weights will be there.

    Raises:
        UserError: With the size of what was to be made.
    """
    sizes: dict[int, int] = {}

    def count(_module: nn.Module, _name: str, weight: nn.Parameter | None) -> None:
        if weight is not None and weight.device.type == "cpu":
            sizes[weight.data_ptr()] = weight.numel() * weight.element_size()
            needed = copies * sum(sizes.values())
            require_fits(needed, "a network of this size", where, mend)

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def require_step_fits(backbone: Backbone, config: TrainConfig, section: str) -> None:
    """Refuses a training whose step cannot fit into the memory of this machine's processors.

    Args:
        backbone: What is trained.
        config: Crop, batch and parts.
        section: Of the recipe, for errors.

    Raises:
        UserError: With the estimate.
    """
    images = config.batch // config.accumulate
    pixels = images * config.crop**2
    most = machine_memory()
    if most is None or pixels * _UNSUSPICIOUS < most:
        return
    needed: float = pixels * _INPUT
    if needed < most:
        needed = pixels * training_bytes(backbone)
    require_fits(
        needed,
        f"a step of {images:,} images of {config.crop:,} x {config.crop:,} pixels",
        f"{section}.batch",
        f"lower {section}.batch or {section}.crop, or cut the batch into parts, one after the "
        f"other ({section}.accumulate)",
    )


def require_fits(needed: float, what: str, where: object, mend: str) -> None:
    """Raises a UserError where that many bytes are more than there are."""
    most = machine_memory()
    if most is not None and needed > most:
        raise UserError(
            f"{what} needs {_size(needed)} of memory at least, and this machine has {_size(most)}",
            where=where,
            mend=mend,
        )


def training_bytes(backbone: Backbone) -> float:
    """Bytes that a training keeps for each pixel of its input until the backward pass."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in backbone.state_dict().values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _evaluating(backbone), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        levels = backbone(_probe(backbone))
        total = sum(kept.values())  # before anything is freed
        del levels
    return max(total / _SIDE**2, _INPUT)


def inference_bytes(backbone: Backbone) -> float:
    """Bytes of input and output of the layer that needs most, for each pixel of the input."""
    most = 0

    def look(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal most
        tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        most = max(most, sum(storages.values()))

    leaves = [m for m in backbone.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(look) for leaf in leaves]
    try:
        with _evaluating(backbone), torch.no_grad():
            backbone(_probe(backbone))
    finally:
        for handle in handles:
            handle.remove()
    return max(most / _SIDE**2, 2 * _INPUT)


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    training = backbone.training
    backbone.eval()  # statistics of norms stay as they are, and no random number is drawn
    try:
        yield
    finally:
        backbone.train(training)


def _probe(backbone: Backbone) -> Tensor:
    return torch.zeros(1, 3, _SIDE, _SIDE, device=next(backbone.parameters()).device)


def _size(count: float) -> str:
    return f"{count / 2**30:,.0f} GiB" if count >= 10 * 2**30 else f"{count / 2**30:,.1f} GiB"
