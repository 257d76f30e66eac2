"""What the operators accept: one place for the words of a refusal.

A wrong shape is a ``ValueError``, a wrong type a ``TypeError``; both say what to pass instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["require_batch", "require_image", "require_maps", "require_tensor"]


def require_maps(name: str, maps: Tensor, shape: str = "B, K, h, w") -> None:
    """Refuses what is not a floating-point tensor of four dimensions, the last two not empty.

    Args:
        name: Name of the argument.
        maps: What was passed.
        shape: What the four dimensions mean, for the message.
    """
    require_tensor(name, maps)
    if maps.ndim != 4:
        hint = f"; add the batch with {name}[None]" if maps.ndim == 3 else ""
        raise ValueError(f"{name} must have shape ({shape}), not {tuple(maps.shape)}{hint}")
    if 0 in maps.shape[-2:]:
        raise ValueError(f"{name} has no pixels: its shape is {tuple(maps.shape)}")
    if not maps.is_floating_point():
        raise TypeError(
            f"{name} must be of a floating-point type, not {maps.dtype}; pass {name}.float()"
        )


def require_image(image: Tensor, dtype: str = "float") -> None:
    """Refuses what is not a (B, 3, H, W) RGB image of the wanted type.

    Args:
        image: What was passed.
        dtype: ``float`` for any floating-point type in [0, 1], ``uint8`` for 0 .. 255.
    """
    require_tensor("image", image)
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape[-2:]:
        hint = ""
        if image.ndim == 3:
            hint = "; add the batch with image[None]"
        elif image.ndim == 4 and image.shape[-1] == 3:
            hint = "; put the channels first with image.permute(0, 3, 1, 2)"
        elif image.ndim == 4 and image.shape[1] == 1:
            hint = "; pass three channels: image.expand(-1, 3, -1, -1) for a grey one"
        raise ValueError(f"image must have shape (B, 3, H, W), not {tuple(image.shape)}{hint}")
    if dtype == "uint8" and image.dtype != torch.uint8:
        raise TypeError(
            f"image must be uint8 RGB of 0 .. 255, not {image.dtype}; "
            "pass (image * 255).round().to(torch.uint8) for values in [0, 1]"
        )
    if dtype == "float" and not image.is_floating_point():
        raise TypeError(
            f"image must be of a floating-point type with values in [0, 1], not {image.dtype}; "
            "pass image.float() / 255"
        )


def require_batch(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Refuses two tensors whose first dimensions differ."""
    if len(tensor) != len(like):
        raise ValueError(
            f"{name} holds {len(tensor)} images and {like_name} {len(like)}; pass as many of each"
        )


def require_tensor(name: str, value: object) -> None:
    """Refuses what is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, not {type(value).__name__}; "
            "wrap an array with torch.from_numpy"
        )
