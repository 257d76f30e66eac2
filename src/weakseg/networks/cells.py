"""Where the cells of a network's maps lie, computed exactly from its kernels, strides and paddings.

Every convolution and pooling maps a linear ramp to a linear ramp: with kernel k, dilation d, stride s
and p zeros before the first pixel, cell j looks around s j + (d (k - 1)) / 2 - p. So the network is run
once on three images, the column, the row and the number 1 of each pixel, with all its convolutions and
poolings replaced by that rule and its norms and activations by nothing. What comes out of the first
two, divided by the third (branches that are added count as often as they are), are the pixels that the
cells of each level look at. Padding that depends on the size of the input (TensorFlow's "same")
follows from the size that is asked for. Nothing is measured and no weight plays a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil, floor
from typing import Any

import torch
from timm.layers import BlurPool2d
from torch import Tensor, nn

from weakseg.ops.cells import Cells

__all__ = ["cells_of", "pads_by_size"]

_FAR = 1e4  # added to coordinates, so that a ReLU between modules leaves them as they are
_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)


def cells_of(
    network: nn.Module,
    size: tuple[int, int],
    forward: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> tuple[Cells, ...]:
    """The cells of each map that a network returns for an image of ``size`` (H, W).

    Args:
        network: Its convolutions and poolings decide.
        size: Of the input in pixels; at least two cells of the coarsest level.
        forward: What to run in place of the network itself; (B, 3, H, W) -> maps (B, C, h, w).

    Returns:
        One for each map, in order. Where branches that lie apart by a pixel or two are added (the
        pooled shortcut of a ResNet-D), their mean.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    ramps = torch.ones(3, *size, dtype=torch.float64, device=device)
    ramps[0] = _FAR + torch.arange(size[0], device=device)[:, None]
    ramps[1] = _FAR + torch.arange(size[1], device=device)
    images = ramps[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _on_ramps(network):
        levels = [level.mean(1) for level in (forward or network)(images)]
    return tuple(_read(level) for level in levels)


def pads_by_size(network: nn.Module) -> bool:
    """Whether the places of a network's cells depend on the size of the image."""
    return any(_is_same(module) for module in network.modules())


def _read(ramps: Tensor) -> Cells:
    """The cells whose rows, columns and counts are (3, h, w)."""
    y, x = ramps[:2] / ramps[2] - _FAR
    return Cells(
        (_exact(y[1, 0] - y[0, 0]), _exact(x[0, 1] - x[0, 0])), (_exact(y[0, 0]), _exact(x[0, 0]))
    )


def _exact(value: Tensor) -> float:
    """Places are whole quarters of pixels; sums of doubles are nearly so."""
    return round(float(value) * 4) / 4


@contextmanager
def _on_ramps(network: nn.Module) -> Iterator[None]:
    """Replaces what the modules of a network do by what it does to places."""
    training = network.training
    network.eval()
    changed = []
    for module in network.modules():
        rule = _rule(module)
        if rule is not None:
            module.forward = rule
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        network.train(training)


def _rule(module: nn.Module) -> Callable[..., Tensor] | None:
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    if isinstance(module, norms):  # timm's hold their activation inside
        return _same
    if isinstance(module, (nn.Conv2d, BlurPool2d, *_POOLS)):
        return lambda x: _moved(module, x)
    if isinstance(module, nn.Conv1d):  # of pooled values: a gate, the same in all three images
        return torch.ones_like
    if isinstance(module, nn.Linear):
        return lambda x: _mixed(x, module.out_features)
    is_leaf = not list(module.children())
    return _same if is_leaf and _keeps_places(module) else None


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _keeps_places(module: nn.Module) -> bool:
    """Whether a module without parts is an activation, a dropout or a scale for each channel."""
    name = type(module).__name__.lower()
    moves = any(
        word in name for word in ("pool", "pad", "shuffle", "upsample", "flatten", "select")
    )
    return not moves and all(p.numel() == max(p.shape, default=1) for p in module.parameters())


def _mixed(x: Tensor, channels: int) -> Tensor:
    """What a linear layer over the last axis makes of ramps (B, h, w, C), or of pooled values."""
    if x.ndim < 4:
        return x.new_ones(*x.shape[:-1], channels)  # a gate, the same in all three images
    return x.mean(-1, keepdim=True).expand(*x.shape[:-1], channels)


def _moved(module: Any, x: Tensor) -> Tensor:
    """What a convolution or a pooling makes of ramps (B, C, h, w)."""
    channels = getattr(module, "out_channels", x.shape[1])
    if x.shape[-2:] == (1, 1):  # of pooled values: a gate, the same in all three images
        return x.new_ones(len(x), channels, 1, 1)
    ramp = x.mean(1)
    first = ramp[:, :1, :1]
    down = ramp[:, 1:2, :1] - first if ramp.shape[1] > 1 else 0 * first
    right = ramp[:, :1, 1:2] - first if ramp.shape[2] > 1 else 0 * first
    rows, columns = (_looked_at(module, x.shape[2 + axis], axis) for axis in (0, 1))
    made = first + down * rows[:, None] + right * columns
    return made[:, None].expand(-1, channels, -1, -1).clone()


def _looked_at(module: Any, length: int, axis: int) -> Tensor:
    """Input coordinates (n,) that the n outputs along an axis look around."""
    kernel, stride, dilation, padding = (
        _along(getattr(module, name, default), axis)
        for name, default in (("kernel_size", 0), ("stride", 1), ("dilation", 1), ("padding", 0))
    )
    kernel = kernel or module.filt_size  # of a BlurPool2d
    reach = dilation * (kernel - 1)
    if _is_same(module):  # as many cells as strides begin; what is missing is shared out
        count = ceil(length / stride)
        padding = max((count - 1) * stride + reach + 1 - length, 0) // 2
    elif isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        padding = reach // 2 if module.padding == "same" else 0
        count = (length + 2 * padding - reach - 1) // stride + 1
    else:
        rounded = ceil if getattr(module, "ceil_mode", False) else floor
        count = rounded((length + 2 * padding - reach - 1) / stride) + 1
        if (count - 1) * stride >= length + padding:  # it would begin in the padding behind
            count -= 1
    return torch.arange(count, dtype=torch.float64) * stride + reach / 2 - padding


def _is_same(module: nn.Module) -> bool:
    """Whether timm pads the module as TensorFlow does, by the size of what comes in."""
    return "Same" in type(module).__name__ or bool(getattr(module, "same_pad", False))


def _along(value: Any, axis: int) -> int:
    """A setting along an axis; words, which say how to pad, are read elsewhere."""
    if isinstance(value, str):
        return 0
    return int(value[axis] if isinstance(value, (tuple, list)) else value)
