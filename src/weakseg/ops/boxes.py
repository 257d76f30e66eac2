"""Boxes from score maps, and how well they localise (weakly-supervised object localisation).

A box is (x0, y0, x1, y1) in pixels of the map, half open: it covers columns x0 .. x1 - 1 and rows
y0 .. y1 - 1, so its area is (x1 - x0) (y1 - y0). PASCAL VOC's annotations count from 1 and include
the last pixel: such a box is (xmin - 1, ymin - 1, xmax, ymax) here. (0, 0, 0, 0) is no box.

The rule is that of Zhou et al. 2016 (Learning deep features for discriminative localization): keep
the pixels above a share of the map's maximum, take the largest connected component, draw the tight
box. The measures are those of Choe et al. 2020 (Evaluating weakly supervised object localization
methods right). Maps are taken as they are: put ReLU before, not min-max, which moves the maximum's
share where scores are negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from weakseg.ops.checks import require_maps, require_tensor

__all__ = [
    "BoxAccuracy",
    "best_overlaps",
    "box_accuracy",
    "box_iou",
    "boxes",
    "component_boxes",
    "gt_known_localisation",
    "largest_box",
    "max_box_accuracy",
    "top1_localisation",
]

_THRESHOLDS = tuple(i / 100 for i in range(100))


@dataclass(frozen=True)
class BoxAccuracy:
    """The best accuracy over thresholds: an oracle, since ground truth chose the threshold.

    Attributes:
        accuracy: In [0, 1]; with several IoUs the mean of the best accuracy at each of them.
        oracle_thresholds: (I,) the threshold that is best at each IoU, the lowest one on ties.
        ious: (I,) overlaps that were asked for.
        thresholds: (T,) thresholds that were compared.
        curves: (I, T) accuracy at each IoU and threshold.
    """

    accuracy: float
    oracle_thresholds: tuple[float, ...]
    ious: tuple[float, ...]
    thresholds: np.ndarray
    curves: np.ndarray


def largest_box(score_map: Tensor, threshold: float = 0.2) -> tuple[int, int, int, int]:
    """The tight box of the largest component of the pixels above a share of the maximum.

    Pixels of a component touch by sides or corners; the largest has the most pixels, and among
    equals it is the one whose box starts highest, then leftmost.

    Args:
        score_map: (h, w) floating point.
        threshold: Share of the map's maximum in [0, 1) that a pixel must exceed.

    Returns:
        (x0, y0, x1, y1); (0, 0, 0, 0) where no score is above zero.

    Raises:
        ValueError: The shape is wrong, or ``threshold`` lies outside [0, 1).
        TypeError: ``score_map`` is no floating-point tensor.
    """
    x0, y0, x1, y1 = _component_boxes(_array(score_map), threshold)[0].tolist()
    return x0, y0, x1, y1


def boxes(maps: Tensor, threshold: float = 0.2) -> Tensor:
    """The box of every map, as ``largest_box`` draws it.

    Args:
        maps: (B, K, h, w) floating point.
        threshold: Share of each map's maximum in [0, 1) that a pixel must exceed.

    Returns:
        (B, K, 4) int64 on the device of ``maps``.
    """
    require_maps("maps", maps)
    b, k, h, w = maps.shape
    flat = maps.detach().float().reshape(b * k, h, w).cpu().numpy()
    found = np.zeros((b * k, 4), dtype=np.int64)
    for i, scores in enumerate(flat):
        found[i] = _component_boxes(scores, threshold)[0]
    return torch.from_numpy(found).reshape(b, k, 4).to(maps.device)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes; 0 where a box is empty.

    Args:
        a: (N, 4) boxes.
        b: (M, 4) boxes.

    Returns:
        (N, M) float32 in [0, 1].
    """
    for name, given in (("a", a), ("b", b)):
        if given.ndim != 2 or given.shape[1] != 4:
            raise ValueError(
                f"{name} must have shape (N, 4), not {tuple(given.shape)}; "
                f"pass {name}.reshape(-1, 4) for a single box"
            )
    first, second = a.double()[:, None], b.double()[None]
    corner = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (corner - torch.maximum(first[..., :2], second[..., :2])).clamp(min=0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (first, second))
    union = area_a + area_b - shared
    return torch.where(union > 0, shared / union, 0.0).float()


def max_box_accuracy(
    maps: Sequence[Tensor] | Tensor,
    gt_boxes: Sequence[Tensor],
    thresholds: Sequence[float] = _THRESHOLDS,
    iou: float | Sequence[float] = 0.5,
    *,
    every_component: bool = False,
) -> BoxAccuracy:
    """MaxBoxAcc: the share of maps whose box fits, at the threshold where it is largest.

    A map is right where its box overlaps any of its ground-truth boxes by at least ``iou``; a map
    without a box is wrong. MaxBoxAccV2 is ``iou=(0.3, 0.5, 0.7), every_component=True``: the mean
    of the best accuracies at three IoUs, with the best of the boxes of all components. The result
    is an ``oracle``: the threshold is chosen on the ground truth that then scores it.

    Args:
        maps: N score maps, each (h, w), of the class whose boxes are given; sizes may differ.
        gt_boxes: N tensors (G, 4), G >= 1, in pixels of the map.
        thresholds: Shares of the maximum in [0, 1) to compare.
        iou: The overlap that is asked for, or several.
        every_component: All components give a box, not the largest alone.

    Returns:
        Accuracy, the oracle thresholds and all curves.

    Raises:
        ValueError: There are no maps or thresholds, counts differ, a shape is wrong, or a
            ground-truth box is empty.
        TypeError: A map is no floating-point tensor.
    """
    if not len(thresholds):
        raise ValueError("there is nothing to compare; pass at least one threshold and one iou")
    return box_accuracy(_overlaps(maps, gt_boxes, thresholds, every_component), thresholds, iou)


def box_accuracy(
    overlaps: np.ndarray, thresholds: Sequence[float], iou: float | Sequence[float] = 0.5
) -> BoxAccuracy:
    """MaxBoxAcc of overlaps that are known already, so that maps need not stay in memory.

    Args:
        overlaps: (T, N) float32, the best overlap of each map's boxes with its ground truth.
        thresholds: (T,) that they were made at.
        iou: The overlap that is asked for, or several.
    """
    ious = tuple(iou) if isinstance(iou, Sequence) else (iou,)
    if not ious or not len(thresholds):
        raise ValueError("there is nothing to compare; pass at least one threshold and one iou")
    curves = np.stack([(overlaps >= np.float32(least)).mean(1) for least in ious])
    return BoxAccuracy(
        accuracy=float(curves.max(1).mean()),
        oracle_thresholds=tuple(float(thresholds[i]) for i in curves.argmax(1)),
        ious=ious,
        thresholds=np.array(thresholds, dtype=np.float64),
        curves=curves,
    )


def best_overlaps(
    score_map: Tensor, gt_boxes: Tensor, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The best overlap of a map's boxes with its ground truth at every threshold.

    Args:
        score_map: (h, w) floating point.
        gt_boxes: (G, 4), G >= 1, in pixels of the map.
        thresholds: Shares of the maximum in [0, 1).

    Returns:
        (T,) float32 for the largest component's box, and (T,) for the best of all components'.

    Raises:
        ValueError: As in ``max_box_accuracy``.
        TypeError: ``score_map`` is no floating-point tensor.
    """
    truth = _require_boxes(gt_boxes, "the map")
    scores = _array(score_map)
    found = [box_iou(torch.from_numpy(_component_boxes(scores, t)), truth) for t in thresholds]
    largest = np.array([o[0].max() for o in found], dtype=np.float32)
    return largest, np.array([o.max() for o in found], dtype=np.float32)


def component_boxes(mask: np.ndarray) -> np.ndarray:
    """(n, 4) int64 boxes of the components of a (H, W) mask, the largest first; (0, 4) if empty.

    Pixels of a component touch by sides or corners.
    """
    return _component_boxes(mask.astype(np.float32), 0.0) if mask.any() else np.zeros((0, 4), int)


def gt_known_localisation(
    maps: Sequence[Tensor] | Tensor,
    gt_boxes: Sequence[Tensor],
    threshold: float = 0.2,
    iou: float = 0.5,
) -> float:
    """The share of maps of the true class whose box fits at one given threshold.

    No oracle as long as ``threshold`` was not chosen on these boxes. Arguments and errors as in
    ``max_box_accuracy``.
    """
    return float((_overlaps(maps, gt_boxes, (threshold,)) >= np.float32(iou)).mean())


def top1_localisation(
    maps: Sequence[Tensor] | Tensor,
    gt_boxes: Sequence[Tensor],
    predicted: Tensor,
    truth: Tensor,
    threshold: float = 0.2,
    iou: float = 0.5,
) -> float:
    """The share of images whose class is predicted rightly and whose box fits.

    Args:
        maps: N score maps, each (h, w), of the predicted class.
        gt_boxes: N tensors (G, 4), boxes of the true class in pixels of the map.
        predicted: (N,) class ids that the network puts first.
        truth: (N,) class ids.
        threshold: Share of each map's maximum in [0, 1) that a pixel must exceed.
        iou: The overlap that is asked for.

    Raises:
        ValueError: As in ``max_box_accuracy``, or the class ids are not N each.
        TypeError: A map is no floating-point tensor.
    """
    for name, ids in (("predicted", predicted), ("truth", truth)):
        if tuple(ids.shape) != (len(maps),):
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)}; pass one class id for each of the "
                f"{len(maps)} maps"
            )
    fits = _overlaps(maps, gt_boxes, (threshold,))[0] >= np.float32(iou)
    return float((fits & (predicted.cpu() == truth.cpu()).numpy()).mean())


def _overlaps(
    maps: Sequence[Tensor] | Tensor,
    gt_boxes: Sequence[Tensor],
    thresholds: Sequence[float],
    every_component: bool = False,
) -> np.ndarray:
    """(T, N) float32: the best IoU of each map's boxes with its ground truth."""
    if len(maps) == 0 or len(maps) != len(gt_boxes):
        raise ValueError(
            f"there are {len(maps)} maps and {len(gt_boxes)} sets of ground-truth boxes; "
            "pass as many of each, and at least one"
        )
    best = np.zeros((len(thresholds), len(maps)), dtype=np.float32)
    for i, (score_map, truth) in enumerate(zip(maps, gt_boxes, strict=True)):
        truth = _require_boxes(truth, f"map {i}")
        scores = _array(score_map)
        for t, threshold in enumerate(thresholds):
            found = _component_boxes(scores, threshold)
            found = found if every_component else found[:1]
            best[t, i] = box_iou(torch.from_numpy(found), truth).max()
    return best


def _require_boxes(truth: Tensor, name: str) -> Tensor:
    truth = truth.cpu()
    if truth.ndim != 2 or truth.shape[1] != 4 or len(truth) == 0:
        raise ValueError(
            f"ground-truth boxes of {name} have shape {tuple(truth.shape)}; pass (G, 4) with "
            "at least one box, and leave maps without a box out"
        )
    if bool((truth[:, :2] >= truth[:, 2:]).any()):
        raise ValueError(f"{name} has an empty ground-truth box; pass x0 < x1 and y0 < y1")
    return truth


def _component_boxes(scores: np.ndarray, threshold: float) -> np.ndarray:
    """(n, 4) int64 boxes of all components, the largest first; one row of zeros if there is none."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}; pass a share of the maximum in [0, 1)")
    above = scores > threshold * scores.max()  # nowhere, where the maximum is not positive
    _, _, stats, _ = cv2.connectedComponentsWithStats(above.astype(np.uint8), connectivity=8)
    if len(stats) == 1:  # the background alone
        return np.zeros((1, 4), dtype=np.int64)
    x0, y0, width, height, area = stats[1:].astype(np.int64).T
    found = np.stack([x0, y0, x0 + width, y0 + height], 1)
    return found[np.lexsort((x0, y0, -area))]


def _array(score_map: Tensor) -> np.ndarray:
    require_tensor("a score map", score_map)
    if score_map.ndim != 2 or score_map.numel() == 0:
        raise ValueError(
            f"a score map must have shape (h, w), not {tuple(score_map.shape)}; "
            "pass one class of one image"
        )
    if not score_map.is_floating_point():
        raise TypeError(
            f"a score map must be of a floating-point type, not {score_map.dtype}; "
            "pass score_map.float()"
        )
    return score_map.detach().float().cpu().numpy()
