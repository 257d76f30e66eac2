"""Superpixels from class probabilities, and the majority vote in them (EdgePredictMix).

Where the class probabilities change quickly there is a border; what lies between borders is one
region, and a region has one label: the one that most of its pixels carry. Edges come from the maps
and not from the image, so texture makes none (Jo et al. 2022, EdgePredictMix).
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from weakseg.ops.checks import require_maps, require_tensor

__all__ = ["majority_vote", "superpixels"]


@torch.no_grad()
def superpixels(
    probabilities: Tensor,
    *,
    edges: Literal["classes", "foreground"] = "classes",
    low: float = 10,
    high: float = 100,
) -> Tensor:
    """Connected regions between the edges of the class probabilities.

    Each map is scaled to 0 .. 255, blurred by a 5 x 5 Gaussian and passed to Canny's edge detector;
    what is no edge falls into components of 4-connected pixels. Computed on the CPU by OpenCV.

    Args:
        probabilities: (B, K, h, w) in [0, 1]; channel 0 is the background.
        edges: ``classes``: the union of the edges of all maps; ``foreground``: the edges of the
            maximum over channels 1 .. K - 1.
        low: An edge is followed down to this gradient (Sobel's, of a map in 0 .. 255).
        high: An edge starts at this gradient.

    Returns:
        (B, h, w) int64: 0 on edges, 1, 2, ... in the regions of each image.

    Raises:
        ValueError: The shape is wrong, or ``edges`` is unknown.
        TypeError: ``probabilities`` is no floating-point tensor.
    """
    require_maps("probabilities", probabilities)
    if edges not in ("classes", "foreground"):
        raise ValueError(f"edges is {edges!r}; pass 'classes' or 'foreground'")
    maps = probabilities.float()
    if edges == "foreground":
        maps = maps[:, 1:]
        maps = maps.amax(1, keepdim=True) if maps.shape[1] else maps
    levels = maps.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    regions = np.empty((len(levels), *levels.shape[2:]), dtype=np.int64)
    for image, found in zip(levels, regions, strict=True):
        edge = np.zeros(found.shape, dtype=np.uint8)
        for level in image:
            if level.any():  # an absent class has no edges
                edge |= cv2.Canny(cv2.GaussianBlur(level, (5, 5), 0), low, high)
        found[:] = cv2.connectedComponents(255 - edge, connectivity=4)[1]
    return torch.from_numpy(regions).to(probabilities.device)


@torch.no_grad()
def majority_vote(
    labels: Tensor,
    superpixels: Tensor,
    ignore: int = 255,
    *,
    overwrite: bool = False,
    unsure_votes: bool = True,
) -> Tensor:
    """Gives the unsure pixels of each superpixel the label that most of its pixels have.

    Unsure pixels vote too, for staying unsure, as in EdgePredictMix's published helper: a
    superpixel that is mostly unsure stays so. Where two labels are equally frequent the smaller one
    wins, and any label wins over unsure. Pixels on an edge (superpixel 0) have no vote; those
    labelled background, 0, become unsure: a border is where background cannot be trusted.

    Args:
        labels: (B, h, w) integers, class ids from 0 and ``ignore``.
        superpixels: (B, h, w) integers from 0, as ``superpixels`` returns them.
        ignore: The label of unsure pixels.
        overwrite: Certain pixels take the majority's label too, not unsure ones only.
        unsure_votes: False = certain pixels alone vote; a superpixel without any stays unsure.

    Returns:
        (B, h, w) of the type of ``labels``.

    Raises:
        ValueError: Shapes are wrong or differ, a value is negative, or ``ignore`` does not fit into
            the type of ``labels``.
        TypeError: A tensor does not hold integers.
    """
    ids, regions = _integers("labels", labels), _integers("superpixels", superpixels)
    if labels.shape != superpixels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and superpixels {tuple(superpixels.shape)}; "
            "pass superpixels of the labels' size"
        )
    if ignore > torch.iinfo(labels.dtype).max:
        raise ValueError(f"{labels.dtype} cannot hold ignore = {ignore}; pass labels.long()")
    if labels.numel() == 0:
        return labels.clone()
    regions = regions.to(ids.device)
    certain, inside = ids != ignore, regions > 0
    num_labels = int((ids * certain).max()) + 2  # the last column counts unsure pixels
    num_regions = int(regions.max()) + 1
    first = torch.arange(len(ids), device=ids.device)[:, None, None] * num_regions
    regions = first + regions  # unique over the batch
    votes = torch.bincount(
        (regions * num_labels + torch.where(certain, ids, num_labels - 1)).flatten(),
        minlength=len(ids) * num_regions * num_labels,
    ).reshape(-1, num_labels)
    if not unsure_votes:
        votes[:, -1] = 0
    unsure = (votes.argmax(1) == num_labels - 1) | (votes.amax(1) == 0)
    winner = votes.argmax(1).masked_fill(unsure, ignore)[regions]
    filled = winner if overwrite else torch.where(certain, ids, winner)
    on_edge = torch.where(ids == 0, ignore, ids)
    return torch.where(inside, filled, on_edge).to(labels.dtype)


def _integers(name: str, values: Tensor) -> Tensor:
    require_tensor(name, values)
    if values.dtype == torch.bool or values.is_floating_point():
        raise TypeError(f"{name} must hold integers, not {values.dtype}; pass {name}.long()")
    if values.ndim != 3:
        hint = f"; add the batch with {name}[None]" if values.ndim == 2 else ""
        raise ValueError(f"{name} must have shape (B, h, w), not {tuple(values.shape)}{hint}")
    values = values.long()
    if values.numel() and int(values.min()) < 0:
        raise ValueError(f"{name} holds {int(values.min())}; pass values from 0")
    return values
