"""Pure tensor functions: the operators, usable on their own."""

from weakseg.ops.boxes import (
    BoxAccuracy,
    box_iou,
    boxes,
    gt_known_localisation,
    largest_box,
    max_box_accuracy,
    top1_localisation,
)
from weakseg.ops.cells import Cells, place
from weakseg.ops.confusion import Metrics, ThresholdSweep, confusion_matrix, metrics
from weakseg.ops.dense_crf import dense_crf, dense_crf_from_labels, dense_crf_many
from weakseg.ops.mask_quality import MaskQuality, mask_agreement, mask_quality
from weakseg.ops.pamr import pamr
from weakseg.ops.random_walk import (
    edge_affinity,
    feature_affinity,
    half_disc,
    random_walk,
    random_walk_from_features,
)
from weakseg.ops.scg import self_correlation
from weakseg.ops.scores import (
    add_background,
    gate,
    merge_maps,
    normalise_max,
    normalise_min_max,
    power_threshold,
)
from weakseg.ops.superpixels import majority_vote, superpixels
from weakseg.ops.thresholds import (
    CRITERIA,
    Criterion,
    ThresholdCurve,
    colour_contrast,
    contrast_threshold,
    label_free_threshold,
)
from weakseg.ops.tiles import Span, spans, stitch
from weakseg.ops.view import View

__all__ = [
    "CRITERIA",
    "BoxAccuracy",
    "Cells",
    "Criterion",
    "MaskQuality",
    "Metrics",
    "Span",
    "ThresholdCurve",
    "ThresholdSweep",
    "View",
    "add_background",
    "box_iou",
    "boxes",
    "colour_contrast",
    "confusion_matrix",
    "contrast_threshold",
    "dense_crf",
    "dense_crf_from_labels",
    "dense_crf_many",
    "edge_affinity",
    "feature_affinity",
    "gate",
    "gt_known_localisation",
    "half_disc",
    "label_free_threshold",
    "largest_box",
    "majority_vote",
    "mask_agreement",
    "mask_quality",
    "max_box_accuracy",
    "merge_maps",
    "metrics",
    "normalise_max",
    "normalise_min_max",
    "pamr",
    "place",
    "power_threshold",
    "random_walk",
    "random_walk_from_features",
    "self_correlation",
    "spans",
    "stitch",
    "superpixels",
    "top1_localisation",
]
