"""Score maps compared with ground truth: the numbers that several benchmarks write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from weakseg.data.images import read_mask
from weakseg.data.samples import Collection
from weakseg.data.scorefile import read_scores
from weakseg.ops import Metrics, confusion_matrix, metrics
from weakseg.recipe import MasksConfig
from weakseg.stages.evaluate import sweep
from weakseg.stages.masks import choose_rule, label
from weakseg.stages.seeds import classification_f1, scores_path

__all__ = ["judge"]


def judge(images: Collection, scores: Path) -> dict[str, Any]:
    """F1, the best threshold (oracle) and the one that needs no masks, each with mIoU, FP, FN,
    precision and recall.

    Scores with a background map of their own need no threshold: theirs are masks of each pixel's
    most probable class, and ``threshold`` is empty.
    """
    swept = sweep(images.samples, scores, len(images.classes))
    threshold, best = swept.best()
    rule = choose_rule(MasksConfig(), scores, images)
    if rule.threshold is None:
        ours = _of_background(images, scores)
    else:
        nearest = int(np.abs(swept.thresholds - rule.threshold).argmin())
        ours = metrics(swept.confusions()[nearest])
    return {
        "f1": classification_f1(images, scores),
        "oracle_threshold": threshold,
        "oracle_miou": best.miou,
        "oracle_fp": best.fp,
        "oracle_fn": best.fn,
        "oracle_precision": best.precision,
        "oracle_recall": best.recall,
        "threshold": "" if rule.threshold is None else rule.threshold,
        "miou": ours.miou,
        "fp": ours.fp,
        "fn": ours.fn,
        "precision": ours.precision,
        "recall": ours.recall,
    }


def _of_background(images: Collection, scores: Path) -> Metrics:
    total = np.zeros((len(images.classes) + 1, len(images.classes) + 2), dtype=np.int64)
    for sample in images:
        if sample.mask is not None:
            mask = label(read_scores(scores_path(scores, sample.id)), None)
            total += confusion_matrix(mask, read_mask(sample.mask), len(images.classes))
    return metrics(total)
