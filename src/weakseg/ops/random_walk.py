"""Random walks of score maps over the pairwise affinity of nearby cells.

The affinity is 1 minus the strongest edge between two cells (IRNet, Ahn et al. 2019) or falls with
the distance of their features (AffinityNet, Ahn & Kwak 2018). Both are differentiable: a network
is trained on them. The N x N transition matrix is never built: a step adds up shifted maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import EllipsisType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weakseg.ops.checks import require_batch, require_maps
from weakseg.ops.threads import bounds, jit, splitter

__all__ = [
    "edge_affinity",
    "feature_affinity",
    "half_disc",
    "path",
    "random_walk",
    "random_walk_from_features",
]

_ROWS = 16  # of a thread, at least


@torch.no_grad()
def random_walk(
    scores: Tensor, edge: Tensor, radius: int = 5, beta: float = 10, steps: int = 256
) -> Tensor:
    """Random walk of the scores that edges hold back (IRNet).

    With A of ``edge_affinity``, 1 on its diagonal, and T = A^beta with columns that sum to 1,

        y = x T^steps,  x = scores (1 - edge).

    Every step replaces a cell's score by an average over its neighbours: no map rises above its
    maximum, and a constant stays. The image's border is not crossed.

    Args:
        scores: (B, K, h, w).
        edge: (B, 1, h, w) probability of an edge, in [0, 1].
        radius: Cells closer than this are neighbours; at least 2.
        beta: Power of the affinity: the higher, the weaker the edges that stop the walk.
        steps: Number of steps, at least 1.

    Returns:
        (B, K, h, w) float32, not normalised; threshold it after dividing by its maximum.

    Raises:
        ValueError: A wrong shape, sizes that differ, or a setting out of range.
        TypeError: Scores or edges that are not floating-point tensors.
    """
    require_maps("scores", scores)
    affinity = edge_affinity(edge, radius)
    _require_same_size("edge", edge, scores)
    return _walk(scores.float() * (1 - edge.float()), affinity, radius, beta, steps)


@torch.no_grad()
def random_walk_from_features(
    scores: Tensor, features: Tensor, radius: int = 5, beta: float = 8, steps: int = 256
) -> Tensor:
    """Random walk of the scores over cells of like features (AffinityNet): y = scores T^steps.

    T is that of ``random_walk``, with ``feature_affinity`` in place of edges.

    Args:
        scores: (B, K, h, w), a background map included where one is wanted.
        features: (B, C, h, w).
        radius: Cells closer than this are neighbours; at least 2.
        beta: Power of the affinity: the higher, the smaller the differences that stop the walk.
        steps: Number of steps, at least 1.

    Returns:
        (B, K, h, w) float32.

    Raises:
        ValueError: A wrong shape, sizes that differ, or a setting out of range.
        TypeError: Scores or features that are not floating-point tensors.
    """
    require_maps("scores", scores)
    affinity = feature_affinity(features, radius)
    _require_same_size("features", features, scores)
    return _walk(scores.float(), affinity, radius, beta, steps)


def half_disc(radius: int) -> list[tuple[int, int]]:
    """Offsets (dy, dx) shorter than the radius, one of each opposite pair: down or to the right.

    Args:
        radius: In cells; 5 gives 34 offsets, 10 gives 152.
    """
    return [
        (dy, dx)
        for dy in range(radius)
        for dx in range(1 - radius, radius)
        if (dy > 0 or dx > 0) and dy * dy + dx * dx < radius * radius
    ]


def path(dy: int, dx: int) -> list[tuple[int, int]]:
    """Cells between (0, 0) and (dy, dx), both included: less than 1 away from the straight line.

    Args:
        dy: Rows down, not negative.
        dx: Columns to the right; negative to the left.
    """
    return [
        (y, x)
        for y in range(dy + 1)
        for x in range(min(dx, 0), max(dx, 0) + 1)
        if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
    ]


def edge_affinity(edge: Tensor, radius: int) -> Tensor:
    """Affinity of each cell with its neighbours: 1 minus the highest edge on the path between.

    Args:
        edge: (B, 1, h, w) probability of an edge, in [0, 1].
        radius: Cells closer than this are neighbours; at least 2.

    Returns:
        (B, P, h, w) float32, P the offsets of ``half_disc(radius)``; 0 for neighbours outside.

    Raises:
        ValueError: A wrong shape or radius.
        TypeError: Edges that are not a floating-point tensor.
    """
    require_maps("edge", edge, "B, 1, h, w")
    if edge.shape[1] != 1:
        raise ValueError(f"edge must have one channel, not {edge.shape[1]}; pass (B, 1, h, w)")
    _require_radius(radius)
    reach = radius - 1
    padded = F.pad(edge[:, 0].float(), (reach, reach, 0, reach), value=1.0)
    height, width = edge.shape[-2:]

    def affinity(dy: int, dx: int) -> Tensor:
        cells = [padded[:, y : y + height, reach + x : reach + x + width] for y, x in path(dy, dx)]
        return 1 - torch.stack(cells).max(0).values  # keeps one index for the backward pass

    return torch.stack([affinity(dy, dx) for dy, dx in half_disc(radius)], 1)


def feature_affinity(features: Tensor, radius: int) -> Tensor:
    """Affinity of each cell with its neighbours: exp(-mean over channels of |f_i - f_j|).

    Args:
        features: (B, C, h, w).
        radius: Cells closer than this are neighbours; at least 2.

    Returns:
        (B, P, h, w) float32, P the offsets of ``half_disc(radius)``; 0 for neighbours outside.

    Raises:
        ValueError: A wrong shape or radius.
        TypeError: Features that are not a floating-point tensor.
    """
    require_maps("features", features, "B, C, h, w")
    _require_radius(radius)
    features = features.float()
    height, width = features.shape[-2:]

    def affinity(dy: int, dx: int) -> Tensor:
        if dy >= height or abs(dx) >= width:
            return features.new_zeros(len(features), height, width)
        left, right = max(-dx, 0), max(dx, 0)
        here = features[:, :, : height - dy, left : width - right]
        there = features[:, :, dy:, right : width - left]
        inside = (-(here - there).abs().mean(1)).exp()
        return F.pad(inside, (left, right, 0, dy))

    # Differences of all channels are computed again for the backward pass rather than kept.
    maps = [
        checkpoint(affinity, dy, dx, use_reentrant=False, preserve_rng_state=False)
        for dy, dx in half_disc(radius)
    ]
    return torch.stack(maps, 1)


def _walk(scores: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """x T^steps; affinity (B, P, h, w), x (B, K, h, w) float32.

    A step is written as y_j = x_j + sum_i A_ij^beta (x_i - x_j) / sum_i A_ij^beta: in float32 the
    plain average drifts by 1e-4 within 256 steps, and this one keeps a constant exactly.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    weights = affinity.clamp_(min=0).pow_(beta)
    offsets = half_disc(radius)
    columns = torch.ones_like(weights[:, 0])
    for (dy, dx), pair in zip(offsets, weights.unbind(1), strict=True):
        columns += pair  # zero where the neighbour is outside
        here, there = _inside(pair.shape[-2:], dy, dx)
        columns[there] += pair[here]
    walk = _walk_on_cpu if scores.device.type == "cpu" else _walk_on_gpu
    return walk(scores.detach().contiguous(), weights, 1 / columns, offsets, steps)


_Index = tuple[EllipsisType, slice, slice]


def _inside(size: Sequence[int], dy: int, dx: int) -> tuple[_Index, _Index]:
    """Indices of the cells whose neighbour at (dy, dx) is inside, and of these neighbours."""
    height, width = size
    left, right = max(-dx, 0), max(dx, 0)
    here = slice(0, max(height - dy, 0)), slice(left, max(width - right, left))
    there = slice(dy, height), slice(right, max(width - left, right))
    return (..., *here), (..., *there)


def _walk_on_gpu(
    scores: Tensor, weights: Tensor, scale: Tensor, offsets: list[tuple[int, int]], steps: int
) -> Tensor:
    pairs = []
    for (dy, dx), pair in zip(offsets, weights.unbind(1), strict=True):
        here, there = _inside(pair.shape[-2:], dy, dx)
        pairs.append((here, there, pair[here][:, None]))
    for _ in range(steps):
        change = torch.zeros_like(scores)
        for here, there, pair in pairs:
            flow = (scores[there] - scores[here]).mul_(pair)
            change[here] += flow
            change[there] -= flow
        scores = change.mul_(scale[:, None]).add_(scores)
    return scores


def _walk_on_cpu(
    scores: Tensor, weights: Tensor, scale: Tensor, offsets: list[tuple[int, int]], steps: int
) -> Tensor:
    """Threads share the rows of a step: up to three times faster than tensors on one core."""
    shifts = np.array(offsets)
    height = scores.shape[-2]
    walked = np.empty(scores.shape, np.float32)
    with splitter(min(torch.get_num_threads(), -(-height // _ROWS))) as split:
        for b in range(len(scores)):
            now, then = scores[b].numpy().copy(), walked[b]
            pairs, factors = weights[b].numpy(), scale[b].numpy()
            for _ in range(steps):
                step = partial(_step, now, then, pairs, factors, shifts)
                split(partial(_on_rows, step, height))
                now, then = then, now
            walked[b] = now
    return torch.from_numpy(walked)


def _on_rows(step: Callable[[int, int], None], height: int, part: int, parts: int) -> None:
    step(*bounds(height, part, parts))


@jit(fastmath={"contract"})
def _step(now, then, weights, scale, shifts, start, stop):
    """Rows start to stop of then = now T; maps (K, h, w), weights (P, h, w), scale (h, w)."""
    count, height, width = now.shape
    change = np.empty(width, now.dtype)
    for y in range(start, stop):
        for k in range(count):
            change[:] = 0
            for p in range(len(shifts)):
                dy, dx = shifts[p]
                left, right = max(-dx, 0), width - max(dx, 0)
                if left >= right:
                    continue
                here, there = slice(left, right), slice(left + dx, right + dx)
                if y + dy < height:
                    _pull(change[here], now[k, y, here], now[k, y + dy, there], weights[p, y, here])
                if y >= dy:
                    other, pair = now[k, y - dy, here], weights[p, y - dy, here]
                    _pull(change[there], now[k, y, there], other, pair)
            for x in range(width):
                then[k, y, x] = now[k, y, x] + change[x] * scale[y, x]


@jit(fastmath={"contract"})
def _pull(change, own, other, weight):
    for x in range(len(change)):
        change[x] += weight[x] * (other[x] - own[x])


def _require_radius(radius: int) -> None:
    if radius < 2:
        raise ValueError(f"radius must be at least 2, not {radius}: below, no cell has neighbours")


def _require_same_size(name: str, maps: Tensor, scores: Tensor) -> None:
    require_batch(name, maps, scores, "scores")
    if maps.shape[-2:] != scores.shape[-2:]:
        size, wanted = tuple(maps.shape[-2:]), tuple(scores.shape[-2:])
        raise ValueError(
            f"{name} has size {size} and scores {wanted}; resize one, for example with "
            f"torch.nn.functional.interpolate(scores, {size}, mode='bilinear')"
        )
