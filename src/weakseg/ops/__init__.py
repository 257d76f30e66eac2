"""Pure tensor functions: the operators, usable on their own."""

from weakseg.ops.confusion import Metrics, ThresholdSweep, confusion_matrix, metrics
from weakseg.ops.scores import (
    add_background,
    gate,
    merge_maps,
    normalise_max,
    normalise_min_max,
    power_threshold,
)
from weakseg.ops.thresholds import ThresholdCurve, label_free_threshold

__all__ = [
    "Metrics",
    "ThresholdCurve",
    "ThresholdSweep",
    "add_background",
    "confusion_matrix",
    "gate",
    "label_free_threshold",
    "merge_maps",
    "metrics",
    "normalise_max",
    "normalise_min_max",
    "power_threshold",
]
