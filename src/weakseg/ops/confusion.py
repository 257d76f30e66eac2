"""Dataset-level evaluation: one int64 confusion matrix, and all thresholds in one pass.

Rows are true classes 0..K, columns predicted 0..K and, last, 255 (unsure): a pixel predicted
unsure counts as wrong. Pixels whose truth is 255 are left out, as PASCAL VOC's evaluation does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["IGNORE", "Metrics", "ThresholdSweep", "confusion_matrix", "metrics"]

IGNORE = 255
"""The id of unsure pixels in masks and labels: losses and metrics leave them out."""

_IDS = 256  # of 8-bit masks


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by true and predicted class.

    Args:
        prediction: (H, W) uint8 in 0..K or 255.
        truth: (H, W) uint8 in 0..K or 255.
        num_classes: K, foreground classes.

    Returns:
        (K + 1, K + 2) int64.

    Raises:
        ValueError: Sizes differ, or an id above K that is not 255.
    """
    if num_classes >= IGNORE:
        raise ValueError(f"ids of {num_classes} classes do not fit below {IGNORE}")
    _require_one_size(prediction, truth)
    if not prediction.dtype == truth.dtype == np.uint8:
        _require_ids(prediction, truth, num_classes)
    # One count of all pairs of bytes, which then says which ids there are.
    pairs = np.left_shift(truth, 8, dtype=np.uint16, casting="unsafe")
    np.bitwise_or(pairs, prediction, out=pairs, casting="unsafe")
    counts = np.bincount(pairs.ravel(), minlength=_IDS**2).reshape(_IDS, _IDS)
    for name, seen in (("prediction", counts.sum(0)), ("truth", counts.sum(1))):
        _require_known(name, int(np.flatnonzero(seen[:IGNORE]).max(initial=0)), num_classes)
    columns = [*range(num_classes + 1), IGNORE]
    return counts[: num_classes + 1, columns].astype(np.int64)


def _require_one_size(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth is {truth.shape}")


def _require_ids(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> None:
    for name, mask in (("prediction", prediction), ("truth", truth)):
        smallest = int(mask.min(initial=0))
        if smallest < 0:
            raise ValueError(f"{name} holds id {smallest}: ids start at 0")
        _require_known(name, int(mask[mask != IGNORE].max(initial=0)), num_classes)


def _require_known(name: str, largest: int, num_classes: int) -> None:
    if largest > num_classes:
        raise ValueError(f"{name} holds id {largest}, but there are {num_classes} classes")


@dataclass(frozen=True)
class Metrics:
    """What a confusion matrix says, as shares in [0, 1].

    Attributes:
        miou: Mean intersection over union of all classes that occur, background included.
        fp: Mean over foreground classes of (P - TP) / (P + T - TP): spilling over.
        fn: The same of (T - TP) / (P + T - TP): missing. IoU + fp + fn = 1 for each class.
        precision: Mean over foreground classes of TP / P.
        recall: Mean over foreground classes of TP / T.
        iou: (K + 1,) by class; NaN where the class is neither true nor predicted.
        class_fp: (K + 1,) likewise.
        class_fn: (K + 1,) likewise.
    """

    miou: float
    fp: float
    fn: float
    precision: float
    recall: float
    iou: np.ndarray
    class_fp: np.ndarray
    class_fn: np.ndarray


def metrics(confusion: np.ndarray) -> Metrics:
    """Summarises a (K + 1, K + 2) confusion matrix."""
    hit = np.diagonal(confusion).astype(np.float64)
    true = confusion.sum(1).astype(np.float64)
    predicted = confusion[:, : len(hit)].sum(0).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        union = predicted + true - hit
        iou, fp, fn = hit / union, (predicted - hit) / union, (true - hit) / union
        precision, recall = hit / predicted, hit / true
    return Metrics(
        miou=_mean(iou),
        fp=_mean(fp[1:]),
        fn=_mean(fn[1:]),
        precision=_mean(precision[1:]),
        recall=_mean(recall[1:]),
        iou=iou,
        class_fp=fp,
        class_fn=fn,
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


class ThresholdSweep:
    """Confusion matrices of every threshold from one pass over the score maps.

    A pixel is its winning class where the best score is above the threshold, else background. So
    counts by (bin of the best score, truth, winner) hold every threshold's matrix.

    Args:
        num_classes: K.
        thresholds: How many, evenly spaced over [0, 1).
    """

    def __init__(self, num_classes: int, thresholds: int = 60) -> None:
        self.num_classes = num_classes
        self.thresholds = np.arange(thresholds) / thresholds
        self._counts = np.zeros((thresholds + 1, num_classes + 1, num_classes + 1), dtype=np.int64)

    def update(self, best: np.ndarray, winner: np.ndarray, truth: np.ndarray) -> None:
        """Adds one image.

        Args:
            best: (H, W) float in [0, 1], the largest foreground score.
            winner: (H, W) int, the class id (1..K) of that score.
            truth: (H, W) uint8 in 0..K or 255.
        """
        _require_one_size(winner, truth)
        _require_ids(winner, truth, self.num_classes)
        known = truth != IGNORE
        # Bin b holds the scores that lie above exactly the first b thresholds; float32, as masks.
        bins = np.searchsorted(self.thresholds.astype(np.float32), best[known].astype(np.float32))
        side = self.num_classes + 1
        flat = (bins * side + truth[known]) * side + winner[known]
        self._counts += np.bincount(flat, minlength=self._counts.size).reshape(self._counts.shape)

    def confusions(self) -> np.ndarray:
        """(T, K + 1, K + 2) int64, one matrix for each threshold."""
        above = self._counts[::-1].cumsum(0)[::-1]
        matrices = np.zeros(
            (len(self.thresholds), self.num_classes + 1, self.num_classes + 2), np.int64
        )
        for t in range(len(self.thresholds)):
            matrices[t, :, :-1] = above[t + 1]
            matrices[t, :, 0] += self._counts[: t + 1].sum((0, 2))
        return matrices

    def confusion(self, thresholds: np.ndarray) -> np.ndarray:
        """(K + 1, K + 2) int64: the matrix where each class has a threshold of its own.

        Args:
            thresholds: (K,) of the classes 1..K; the next lower one of the swept is taken.
        """
        matrix = np.zeros((self.num_classes + 1, self.num_classes + 2), np.int64)
        places = np.searchsorted(self.thresholds, thresholds, side="right")
        for winner, place in enumerate(places, start=1):
            matrix[:, winner] += self._counts[place:, :, winner].sum(0)
            matrix[:, 0] += self._counts[:place, :, winner].sum(0)
        matrix[:, 0] += self._counts[:, :, 0].sum(0)  # images without any map
        return matrix

    def best(self) -> tuple[float, Metrics]:
        """The threshold with the highest mIoU: it saw ground truth, so it is an *oracle* number."""
        results = [metrics(matrix) for matrix in self.confusions()]
        index = int(np.nanargmax([r.miou for r in results]))
        return float(self.thresholds[index]), results[index]
