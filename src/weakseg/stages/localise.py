"""Localisation: boxes drawn from the score maps of a run against true boxes.

The measures are made for images of one class (Choe et al., CVPR 2020); images with several tags
need definitions of their own:

* A *pair* is an image with a class that has at least one true box there. The box of its map is
  right where it overlaps any of that class's true boxes by at least the IoU. A pair whose class is
  not tagged has no map, since score files hold tagged classes alone: it counts as wrong, and the
  number of such pairs is given beside the result.
* *GT-known*: the share of pairs that are right with the rule of Zhou et al. (CVPR 2016), the largest
  component above 20 % of the map's maximum, at IoU .5. The class is given; nothing else is.
* *Top-k error*: the share of images with true boxes where none of the k classes that the network
  puts first (by the probabilities in the score file) has a right box by that rule. With one class
  in each image this is the usual top-k localisation error.
* *MaxBoxAcc*: the share of right pairs at the best of all thresholds, by the largest component;
  *V2*: with the best box of all components, as the mean over IoU .3, .5 and .7. The thresholds are
  chosen on the true boxes: these are oracles.

Maps are taken at the size of the image, and positive parts only, as score files keep them. Where a
method gives a background, its maps are probabilities among the tagged classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weakseg.console import track
from weakseg.csvfile import write_csv
from weakseg.data.samples import Collection, Sample
from weakseg.data.scorefile import read_scores
from weakseg.errors import UserError
from weakseg.ops.boxes import best_overlaps, box_accuracy, component_boxes
from weakseg.recipe import Recipe
from weakseg.stagefiles import fingerprint
from weakseg.stages.seeds import scores_path

__all__ = ["IOUS", "RULE", "BoxSource", "box_source", "has_boxes", "localise", "write_boxes_table"]

RULE = 0.2
"""Share of a map's maximum above which the box is drawn."""

IOUS = (0.3, 0.5, 0.7)
"""Overlaps of MaxBoxAccV2; the other measures take the middle one."""

_SOURCES = {"xml": "voc", "coco": "coco"}
_WORDS = {
    "xml": "boxes of VOC XML",
    "coco": "boxes of COCO",
    "masks": "boxes of the masks' components",
}


@dataclass(frozen=True)
class BoxSource:
    """Where true boxes come from.

    Attributes:
        words: What every number says of it.
        known: Whether a sample has them; a sample that is known and has no object has no box.
        read: Class id -> (G, 4) boxes in pixels of the image, half open.
        fingerprint: Of the boxes themselves; of the masks' the evaluation keeps its own.
    """

    words: str
    known: Callable[[Sample], bool]
    read: Callable[[Sample], dict[int, Tensor]]
    fingerprint: str


def has_boxes(recipe: Recipe, collection: Collection) -> bool:
    """Whether the recipe wants boxes and the data have any, apart from masks."""
    return recipe.evaluate.boxes is not None and any(s.boxes is not None for s in collection)


def box_source(recipe: Recipe, collection: Collection) -> BoxSource | None:
    """The source that ``evaluate.boxes`` names; ``None`` where it is off.

    A collection has one source: with ``auto`` its own boxes where it has any, and then images
    without are left out; else every 8-connected component of a class in a mask is a box. Parts of
    one object that something hides are then boxes of their own, and objects of a class that touch
    are one box.

    Raises:
        UserError: The data have no such boxes.
    """
    wanted, origin = recipe.evaluate.boxes, recipe.data.source
    if wanted is None:
        return None
    boxed = any(s.boxes is not None for s in collection)
    masked = any(s.mask is not None for s in collection)
    own = wanted in _SOURCES or (wanted == "auto" and boxed)
    if wanted in _SOURCES and (not boxed or origin != _SOURCES[wanted]):
        raise UserError(
            f"the data (source {origin!r}) have no {_WORDS[wanted]}",
            where="evaluate.boxes",
            mend=f"read them with data.source: {_SOURCES[wanted]}"
            if origin != _SOURCES[wanted]
            else "give the annotations with boxes, or take evaluate.boxes: masks",
        )
    if not own and not masked:
        raise UserError(
            "the data have neither boxes nor masks to take them from",
            where="evaluate.boxes",
            mend="give masks with data.masks (--masks FOLDER), or a source with boxes",
        )
    column = {name: i for i, name in enumerate(collection.classes, 1)}
    if not own:
        return BoxSource(
            _WORDS["masks"],
            lambda s: s.mask is not None,
            lambda s: _of_mask(s, len(column)),
            "masks",
        )
    key = next((k for k, source in _SOURCES.items() if source == origin), None)
    return BoxSource(
        _WORDS[key] if key else f"boxes of the source {origin!r}",
        lambda s: s.boxes is not None,
        lambda s: _of_sample(s, column),
        fingerprint([(s.id, repr(s.boxes)) for s in collection if s.boxes is not None]),
    )


def localise(
    samples: Sequence[Sample], scores: Path, source: BoxSource, thresholds: int, title: str = ""
) -> dict[str, Any] | None:
    """All measures of a folder of score files.

    Args:
        samples: Those that ``source`` knows.
        scores: Folder of score files.
        source: Of the true boxes.
        thresholds: Number of thresholds of MaxBoxAcc, evenly spaced over [0, 1).
        title: Of the progress bar.

    Returns:
        Shares in [0, 1], thresholds and counts by name; ``None`` where no image has a box.
        ``top1_error`` is ``None`` without a classifier, ``top5_error`` also with five classes or
        fewer, where it says nothing of the class.
    """
    steps = np.arange(thresholds) / thresholds
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda s: _one(s, scores, source, (RULE, *steps.tolist())), samples)
        images = [one for one in track(found, title or "boxes", len(samples)) if one is not None]
    if not images:
        return None
    largest = np.concatenate([one.largest for one in images]).T
    every = np.concatenate([one.every for one in images]).T
    middle = IOUS[1]
    first, second = (
        box_accuracy(overlaps[1:], steps.tolist(), IOUS) for overlaps in (largest, every)
    )
    hits = {
        k: None
        if any(one.classes is None for one in images)
        else float(np.mean([not one.hit(k) for one in images]))
        for k in (1, 5)
    }
    few = images[0].classes is not None and len(images[0].classes) <= 5
    return {
        "boxes": source.words,
        "images": len(images),
        "pairs": int(largest.shape[1]),
        "pairs_without_map": sum(one.unmapped for one in images),
        "gt_known": float((largest[0] >= np.float32(middle)).mean()),
        "top1_error": hits[1],
        "top5_error": None if few else hits[5],
        "ious": list(IOUS),
        "max_box_acc": [float(v) for v in first.curves.max(1)],
        "max_box_acc_thresholds": list(first.oracle_thresholds),
        "max_box_acc_v2": second.accuracy,
        "max_box_acc_v2_at": [float(v) for v in second.curves.max(1)],
        "max_box_acc_v2_thresholds": list(second.oracle_thresholds),
    }


def write_boxes_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV; lists are written with spaces between their numbers."""
    flat = [
        {k: " ".join(f"{v:g}" for v in x) if _is_list(x) else x for k, x in row.items()}
        for row in rows
    ]
    write_csv(path, list(rows[0]) if rows else [], flat)


@dataclass(frozen=True)
class _Image:
    """Overlaps of one image's pairs.

    Attributes:
        largest: (P, T) of the largest component, the rule's threshold first.
        every: (P, T) of all components.
        right: Class ids whose box is right by the rule.
        classes: (K,) class ids, the most probable first; ``None`` without a classifier.
        unmapped: Pairs that have no map.
    """

    largest: np.ndarray
    every: np.ndarray
    right: frozenset[int]
    classes: np.ndarray | None
    unmapped: int

    def hit(self, k: int) -> bool:
        assert self.classes is not None
        return bool(self.right & set(self.classes[:k].tolist()))


def _one(
    sample: Sample, scores: Path, source: BoxSource, thresholds: Sequence[float]
) -> _Image | None:
    truth = source.read(sample)
    if not truth:
        return None
    seed = read_scores(scores_path(scores, sample.id))
    ids, maps = seed.full_size().foreground()
    row = {int(c): i for i, c in enumerate(ids)}
    pairs, unmapped = [], 0
    for c, boxes in truth.items():
        if c in row:
            pairs.append(best_overlaps(torch.from_numpy(maps[row[c]]), boxes, thresholds))
        else:
            unmapped += 1
            pairs.append((np.zeros(len(thresholds), np.float32),) * 2)
    right = (c for c, pair in zip(truth, pairs, strict=True) if pair[0][0] >= np.float32(IOUS[1]))
    order = None if seed.probabilities is None else np.argsort(-seed.probabilities, kind="stable")
    return _Image(
        np.stack([p[0] for p in pairs]),
        np.stack([p[1] for p in pairs]),
        frozenset(right),
        None if order is None else order + 1,
        unmapped,
    )


def _of_sample(sample: Sample, column: dict[str, int]) -> dict[int, Tensor]:
    found: dict[int, list[tuple[float, ...]]] = {}
    for box in sample.boxes or ():
        if box.tag in column and box.x1 < box.x2 and box.y1 < box.y2:
            found.setdefault(column[box.tag], []).append((box.x1, box.y1, box.x2, box.y2))
    return {c: torch.tensor(boxes, dtype=torch.float64) for c, boxes in sorted(found.items())}


def _of_mask(sample: Sample, classes: int) -> dict[int, Tensor]:
    mask = sample.truth()
    present = [int(c) for c in np.unique(mask) if 0 < c <= classes]
    return {c: torch.from_numpy(component_boxes(mask == c)) for c in present}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
