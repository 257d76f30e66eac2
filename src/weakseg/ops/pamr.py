"""Pixel-adaptive mask refinement: maps follow the colours of the image (PAMR, PAR).

The weights of a pixel's neighbours depend on the image alone; each iteration replaces every value
of a map by the weighted mean of its neighbours' values. On the CPU both steps are compiled loops;
elsewhere they are sums over shifted tensors, which need no memory of (B, K, P, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.ops.checks import require_batch, require_image, require_maps
from weakseg.ops.threads import bounds, jit, splitter

__all__ = ["pamr"]

_STEPS = [step for step in product((-1, 0, 1), repeat=2) if step != (0, 0)]
_EPS = 1e-8
_SIGMA_FACTOR = {"pamr": 0.1, "par": 0.3}
_POSITION_WEIGHT = 0.01  # of PAR's term of distance


class _Rule(NamedTuple):
    """How colours become weights; the fields that the two variants differ in."""

    factor: float  # of sigma
    eps: float  # added to factor * sigma
    centre: int  # how often the pixel itself is a sample of sigma
    square: bool  # of the scaled colour difference
    appearance: float  # weight of the softmax over colours
    position: np.ndarray  # (P,) float32, added to that softmax


@torch.no_grad()
def pamr(
    image: Tensor,
    maps: Tensor,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    *,
    variant: Literal["pamr", "par"] = "pamr",
    sigma_factor: float | None = None,
    normalise: bool = True,
) -> Tensor:
    """Refines maps by repeated weighted means over neighbours of similar colour.

    A pixel p has P = 8 neighbours n per dilation; outside the image the border is repeated. With
    I the image and sigma the standard deviation (divisor N - 1) of a channel around p,

        pamr:  w_n = softmax_n( - mean_rgb |I(p) - I(n)| / (0.1 sigma + 1e-8) )
        par:   w_n = softmax_n( - mean_rgb (|I(p) - I(n)| / (0.3 (sigma + 1e-8)))^2 )
                     + 0.01 softmax_n( - (d_n / (0.3 (sigma_d + 1e-8)))^2 ),

    d_n the distance of the neighbour and sigma_d its deviation over the neighbours. PAMR takes
    sigma over the full 3 x 3 windows (9 samples per dilation), PAR leaves the centres out. Then
    m(p) <- sum_n w_n m(n), ``iterations`` times. The weights sum to one, so maps keep their range
    and maps that sum to one over K keep that sum. No gradient flows.

    Args:
        image: (B, 3, H, W) RGB in [0, 1], any floating-point type; without the normalisation of a
            network.
        maps: (B, K, h, w), any floating-point type and range; resized to (H, W) bilinearly with
            aligned corners where the sizes differ. An image reduced to the maps' size costs less.
        dilations: Distances of the neighbours in pixels, each at least 1.
        iterations: How often the mean is taken; 0 returns the resized maps.
        variant: ``pamr`` (Araslanov & Roth, CVPR 2020; the published code's form of the weights)
            or ``par`` (Ru et al., AFA, CVPR 2022).
        sigma_factor: Factor of sigma in the colour term, above 0: the smaller, the fewer
            neighbours count. ``None`` takes the variant's own, 0.1 or 0.3.
        normalise: Divides PAR's weights by their sum. ``False`` is the published form, where they
            sum to 1.01 and values grow by 1.01 per iteration. No effect on ``pamr``.

    Returns:
        (B, K, H, W) float32 on the device of ``maps``.

    Raises:
        ValueError: For a wrong shape, dilation, number of iterations, variant or factor.
        TypeError: For a wrong type.
    """
    require_image(image)
    require_maps("maps", maps)
    require_batch("maps", maps, image, "image")
    if not dilations or any(d < 1 or d != int(d) for d in dilations):
        raise ValueError(f"dilations must be one or more whole numbers >= 1, not {dilations}")
    if iterations < 0 or iterations != int(iterations):
        raise ValueError(f"iterations must be a whole number >= 0, not {iterations}")
    if variant not in _SIGMA_FACTOR:
        raise ValueError(f"variant must be 'pamr' or 'par', not {variant!r}")
    if sigma_factor is None:
        sigma_factor = _SIGMA_FACTOR[variant]
    if not sigma_factor > 0:
        raise ValueError(f"sigma_factor must be above 0, not {sigma_factor}")

    size = image.shape[-2:]
    if maps.numel() == 0:  # no maps or no images, which interpolation refuses
        return maps.new_zeros((*maps.shape[:2], *size), dtype=torch.float32)
    image, maps = image.to(maps.device, torch.float32), maps.float()
    if maps.shape[-2:] != size:
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=True)
    reaches = tuple(int(d) for d in dilations)
    rule = _rule(variant, reaches, sigma_factor, normalise)
    refine = _with_loops if maps.device.type == "cpu" else _with_tensors
    return refine(image, maps, reaches, int(iterations), rule)


def _rule(variant: str, dilations: tuple[int, ...], factor: float, normalise: bool) -> _Rule:
    if variant == "pamr":
        zeros = np.zeros(len(_STEPS) * len(dilations), np.float32)
        return _Rule(factor, _EPS, len(dilations), False, 1.0, zeros)
    distance = np.array([d * np.hypot(dy, dx) for d in dilations for dy, dx in _STEPS])
    position = np.exp(-((distance / (distance.std(ddof=1) + _EPS) / factor) ** 2))
    position *= _POSITION_WEIGHT / position.sum()
    total = 1 + _POSITION_WEIGHT if normalise else 1.0
    return _Rule(factor, factor * _EPS, 0, True, 1 / total, (position / total).astype(np.float32))


def _shifts(dilations: tuple[int, ...], height: int, width: int) -> list[tuple[int, int]]:
    """(P) offsets (dy, dx); one that leaves the image from every pixel is as good as side - 1."""
    return [
        (dy * min(d, height - 1), dx * min(d, width - 1)) for d in dilations for dy, dx in _STEPS
    ]


def _with_tensors(
    image: Tensor, maps: Tensor, dilations: tuple[int, ...], iterations: int, rule: _Rule
) -> Tensor:
    """The plain tensor path: any device, one neighbour at a time."""
    height, width = image.shape[-2:]
    shifts = _shifts(dilations, height, width)
    reach = max(dilations)
    top, left = min(reach, height - 1), min(reach, width - 1)

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (left, left, top, top), mode="replicate")

    def shifted(x: Tensor, shift: tuple[int, int]) -> Tensor:
        y, x0 = top + shift[0], left + shift[1]
        return x[..., y : y + height, x0 : x0 + width]

    colours = padded(image)
    samples = len(shifts) + rule.centre
    mean = torch.zeros_like(image)  # of the differences to the centre
    for shift in shifts:
        mean += shifted(colours, shift) - image
    mean /= samples
    variance = rule.centre * mean**2
    for shift in shifts:
        variance += (shifted(colours, shift) - image - mean) ** 2
    scale = rule.factor * (variance / (samples - 1)).sqrt() + rule.eps
    logits = []
    for shift in shifts:
        difference = (shifted(colours, shift) - image).abs() / scale
        logits.append(-(difference**2 if rule.square else difference).mean(1))
    weights = torch.stack(logits, 1).softmax(1) * rule.appearance
    weights += torch.from_numpy(rule.position).to(weights.device)[:, None, None]

    refined = maps.clone()
    for _ in range(iterations):
        around, refined = padded(refined), torch.zeros_like(refined)
        for n, shift in enumerate(shifts):
            refined.addcmul_(shifted(around, shift), weights[:, n, None])
    return refined


def _with_loops(
    image: Tensor, maps: Tensor, dilations: tuple[int, ...], iterations: int, rule: _Rule
) -> Tensor:
    """The CPU path: compiled loops over rows, with columns padded so that no index is clamped."""
    height, width = image.shape[-2:]
    pad = min(max(dilations), width - 1)
    columns = ((0, 0), (0, 0), (pad, pad))
    down, right = np.array(_shifts(dilations, height, width)).T
    rows = np.clip(np.arange(height)[:, None] + down, 0, height - 1)
    starts = pad + right
    weights = np.empty((height, len(starts), width), np.float32)
    numbers = np.array([rule.factor, rule.eps, rule.centre, rule.appearance], np.float32)
    refined = torch.empty(maps.shape, dtype=torch.float32)
    with splitter(torch.get_num_threads()) as split:

        def over_rows(loop: Callable[..., None], *arguments: object) -> None:
            split(lambda part, parts: loop(*bounds(height, part, parts), *arguments))

        for b in range(len(maps)):
            colours = np.pad(image[b].detach().numpy(), columns, "edge")
            old = np.pad(maps[b].detach().numpy(), columns, "edge")
            new = np.empty_like(old)
            over_rows(_weigh, colours, rows, starts, numbers, rule.square, rule.position, weights)
            for _ in range(iterations):
                over_rows(_average, old, rows, starts, weights, new)
                old, new = new, old
            refined[b] = torch.from_numpy(old[..., pad : pad + width])
    return refined


# Each row is written by one thread alone, in one order: the number of threads changes nothing.


@jit(error_model="numpy")
def _weigh(first, stop, colours, rows, starts, numbers, square, position, weights):
    """Writes the weights (H, P, W) of an image (3, H, W + 2 pad)."""
    _, neighbours, width = weights.shape
    pad = (colours.shape[2] - width) // 2
    factor, eps, centre, appearance = numbers
    samples = np.float32(neighbours) + centre
    for y in range(first, stop):
        here = weights[y]
        here[:] = 0
        mean, scale = np.empty((2, width), np.float32)
        for c in range(3):
            middle = colours[c, y, pad : pad + width]
            mean[:] = 0  # of the differences to the centre
            for n in range(neighbours):
                other = colours[c, rows[y, n], starts[n] : starts[n] + width]
                for x in range(width):
                    mean[x] += other[x] - middle[x]
            for x in range(width):
                mean[x] /= samples
                scale[x] = centre * mean[x] * mean[x]
            for n in range(neighbours):
                other = colours[c, rows[y, n], starts[n] : starts[n] + width]
                for x in range(width):
                    scale[x] += (other[x] - middle[x] - mean[x]) ** 2
            for x in range(width):
                scale[x] = factor * np.sqrt(scale[x] / (samples - np.float32(1))) + eps
            for n in range(neighbours):
                other = colours[c, rows[y, n], starts[n] : starts[n] + width]
                for x in range(width):
                    difference = abs(other[x] - middle[x]) / scale[x]
                    if square:
                        difference *= difference
                    here[n, x] -= difference / np.float32(3)
        highest, total = mean, scale  # the softmax takes their place
        highest[:] = here[0]
        total[:] = 0
        for n in range(1, neighbours):
            for x in range(width):
                highest[x] = max(highest[x], here[n, x])
        for n in range(neighbours):
            for x in range(width):
                here[n, x] = np.exp(here[n, x] - highest[x])
                total[x] += here[n, x]
        for n in range(neighbours):
            for x in range(width):
                here[n, x] = appearance * here[n, x] / total[x] + position[n]


@jit(error_model="numpy")
def _average(first, stop, old, rows, starts, weights, new):
    """One iteration over maps (K, H, W + 2 pad), the padding of ``new`` included."""
    _, neighbours, width = weights.shape
    pad = (old.shape[2] - width) // 2
    for y in range(first, stop):
        for k in range(len(old)):
            total = new[k, y, pad : pad + width]
            total[:] = 0
            for n in range(neighbours):
                weight = weights[y, n]
                other = old[k, rows[y, n], starts[n] : starts[n] + width]
                for x in range(width):
                    total[x] += weight[x] * other[x]
            new[k, y, :pad] = total[0]
            new[k, y, pad + width :] = total[-1]
