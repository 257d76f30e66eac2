"""What a run folder says about itself, read so that any part of it may be missing.

A report is most needed where a run went wrong. So nothing here raises on a file that is absent,
damaged or of an older format: that part is simply not there.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weakseg.csvfile import read_csv
from weakseg.data.samples import Collection, Sample
from weakseg.methods import needs_segmenter
from weakseg.recipe import Recipe
from weakseg.runfolder import STAGES, RunFolder
from weakseg.stagefiles import StageRecord

__all__ = ["Facts", "Localised", "Score", "Sweep", "Threshold", "gather"]

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Threshold:
    """How background was told from foreground (``5-masks/rule.json``).

    Attributes:
        rule: ``label-free``, ``constant`` or ``power``.
        value: The threshold on the best score.
        margin: Scores this close to it became unsure.
        chosen_by: How it was chosen, in words.
        histogram: Pixels by best foreground score, evenly spaced bins over [0, 1].
        criterion: What the rule looked at, as (threshold, value) points; may be empty.
        criterion_name: Its name.
    """

    rule: str
    value: float | None
    margin: float = 0.0
    chosen_by: str = ""
    histogram: tuple[float, ...] = ()
    criterion: Curve = field(default_factory=list)
    criterion_name: str = "criterion"

    def share_near(self, distance: float) -> float | None:
        """Share of pixels whose best score lies within ``distance`` of the threshold."""
        total = sum(self.histogram)
        if self.value is None or not total:
            return None
        bins = len(self.histogram)
        near = (abs((i + 0.5) / bins - self.value) <= distance for i in range(bins))
        return sum(n for n, inside in zip(self.histogram, near, strict=True) if inside) / total

    def share_above(self) -> float | None:
        """Share of pixels above the threshold, the foreground."""
        total = sum(self.histogram)
        if self.value is None or not total:
            return None
        bins = len(self.histogram)
        return sum(n for i, n in enumerate(self.histogram) if (i + 0.5) / bins > self.value) / total


@dataclass(frozen=True)
class Score:
    """One row of ``8-evaluate/results.json``: all values are shares in [0, 1] or unknown."""

    stage: str
    split: str
    images: int
    rule: str
    threshold: float | None
    conditions: tuple[str, ...]
    miou: float | None
    fp: float | None
    fn: float | None
    precision: float | None
    recall: float | None
    iou: tuple[float | None, ...]
    class_fp: tuple[float | None, ...]
    class_fn: tuple[float | None, ...]
    head: str = ""
    scales: tuple[float, ...] = ()
    flip: bool = False
    crf: str = "none"
    tags: str = ""
    f1: float | None = None

    @property
    def oracle(self) -> bool:
        """True where ground truth chose something in it."""
        return self.rule == "oracle"


@dataclass(frozen=True)
class Sweep:
    """Quality over thresholds, as (threshold, share) points."""

    split: str
    miou: Curve
    fp: Curve
    fn: Curve

    @property
    def best(self) -> tuple[float, float] | None:
        """(threshold, mIoU) of the best threshold: an *oracle* number."""
        return max(self.miou, key=lambda point: point[1], default=None)

    def at(self, threshold: float) -> float | None:
        """mIoU at the swept threshold nearest to this one."""
        nearest = min(self.miou, key=lambda point: abs(point[0] - threshold), default=None)
        return nearest[1] if nearest else None


@dataclass(frozen=True)
class Localised:
    """One row of ``8-evaluate/boxes.json``: shares in [0, 1] or unknown."""

    stage: str
    split: str
    images: int
    pairs: int
    unmapped: int
    boxes: str
    rule: str
    conditions: tuple[str, ...]
    gt_known: float | None
    top1_error: float | None
    top5_error: float | None
    max_box_acc: tuple[float | None, ...]
    max_box_acc_v2: float | None


@dataclass(frozen=True)
class Facts:
    """Everything that a report is made of.

    Attributes:
        records: Stage name -> record, of the stages that left one.
        check: ``check.json``, or an empty dictionary.
        losses: Stage (``train``, ``segment``) -> term -> (step, value) points.
        worst: ``mask`` or ``segmenter`` -> (id, IoU), the worst first.
        uncertain: (id, estimated quality) of masks, the least certain first.
        date: When the newest stage record was written, in words.
    """

    run: RunFolder
    collection: Collection
    recipe: Recipe
    recipe_text: str
    records: dict[str, StageRecord]
    check: dict[str, Any]
    threshold: Threshold | None
    scores: tuple[Score, ...]
    sweep: Sweep | None
    worst: dict[str, list[tuple[str, float]]]
    uncertain: list[tuple[str, float]]
    losses: dict[str, dict[str, Curve]]
    date: str
    localised: tuple[Localised, ...] = ()

    def result(self, stage: str, key: str) -> Any:
        """One entry of a stage's results, or ``None``."""
        record = self.records.get(stage)
        return record.results.get(key) if record is not None else None

    def done(self, stage: str) -> bool:
        """True where the stage is done."""
        record = self.records.get(stage)
        return record is not None and record.status == "done"

    @property
    def expected(self) -> tuple[str, ...]:
        """Stages that a complete run of this recipe and collection has."""
        enabled = self.recipe.segmenter_wanted
        skipped = {"predict"} if enabled is False else set()
        if not needs_segmenter(self.recipe.method, enabled):
            skipped.add("segment")
        if self.recipe.seeds.given is not None:
            skipped.add("train")
        if not self.recipe.refine:
            skipped.add("refine")
        if not self.has_truth and not self.has_boxes:
            skipped.add("evaluate")
        return tuple(name for name in STAGES if name not in skipped)

    @property
    def has_truth(self) -> bool:
        """True where the collection has ground-truth masks."""
        return any(s.mask is not None for s in self.collection)

    @property
    def has_boxes(self) -> bool:
        """True where the recipe wants boxes evaluated and the collection has some."""
        wanted = self.recipe.evaluate.boxes is not None
        return wanted and any(s.boxes is not None for s in self.collection)

    @property
    def given_classifier(self) -> str | None:
        """Name of the file of a classifier that was taken as it is, with nothing trained."""
        path = self.recipe.method.get("from_classifier")
        return None if path is None else Path(path).name

    @property
    def train_samples(self) -> tuple[Sample, ...]:
        """The samples that are trained on."""
        return self.collection.split(*self.recipe.data.train).samples

    def best_row(self, stage: str, splits: Sequence[str], *, oracle: bool = False) -> Score | None:
        """The first row of a stage on one of these splits; any split if none has it."""
        rows = [r for r in self.scores if r.stage == stage and r.oracle == oracle]
        return next((r for r in rows if r.split in splits), rows[0] if rows else None)


def gather(run: RunFolder, collection: Collection, recipe: Recipe, *, losses: bool = True) -> Facts:
    """Reads whatever is there; losses, whose logs are long, only where they are wanted."""
    records = {name: record for name in STAGES if (record := run.record(name)) is not None}
    results = _read_json(run.stage_folder("evaluate") / "results.json")
    facts = Facts(
        run=run,
        collection=collection,
        recipe=recipe,
        recipe_text=_read_text(run.recipe_file) or recipe.to_yaml(),
        records=records,
        check=_read_json(run.stage_folder("check") / "check.json"),
        threshold=_threshold(_read_json(run.stage_folder("masks") / "rule.json")),
        scores=tuple(_score(row) for row in entries(results, "rows") if isinstance(row, dict)),
        sweep=_sweep(results.get("sweep")),
        worst=_worst(results.get("worst")),
        uncertain=_uncertain(run.stage_folder("masks") / "quality.csv"),
        losses={
            "train": _losses(run.stage_folder("train")),
            "refine": _losses(run.stage_folder("refine") / "network"),
            "segment": _losses(run.stage_folder("segment")),
        }
        if losses
        else {},
        date=_date(run),
        localised=tuple(
            _localised(row)
            for row in entries(_read_json(run.stage_folder("evaluate") / "boxes.json"), "rows")
            if isinstance(row, dict)
        ),
    )
    for stage in set(STAGES) - set(facts.expected):  # an earlier recipe may have left them
        facts.records.pop(stage, None)
        facts.losses.pop(stage, None)
    return facts


def number(value: Any) -> float | None:
    """A finite number, or ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def entries(values: dict[str, Any], key: str) -> list[Any]:
    """The list under a key, or an empty one."""
    value = values.get(key)
    return value if isinstance(value, list) else []


def _numbers(values: dict[str, Any], key: str) -> tuple[float | None, ...]:
    return tuple(number(v) for v in entries(values, key))


def _curve(values: dict[str, Any], x: str, y: str) -> Curve:
    pairs = zip(_numbers(values, x), _numbers(values, y), strict=False)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _threshold(values: dict[str, Any]) -> Threshold | None:
    if not values:
        return None
    criterion = values.get("criterion")
    criterion = criterion if isinstance(criterion, dict) else {}
    return Threshold(
        rule=str(values.get("rule", "")),
        value=number(values.get("threshold")),
        margin=number(values.get("margin")) or 0.0,
        chosen_by=str(values.get("chosen_by") or ""),
        histogram=tuple(max(n or 0.0, 0.0) for n in _numbers(values, "histogram")),
        criterion=_curve(criterion, "thresholds", "values"),
        criterion_name=str(criterion.get("name") or "criterion"),
    )


def _score(row: dict[str, Any]) -> Score:
    return Score(
        stage=str(row.get("stage", "")),
        split=str(row.get("split", "")),
        images=int(number(row.get("images")) or 0),
        rule=str(row.get("rule") or ""),
        threshold=number(row.get("threshold")),
        conditions=_conditions(row),
        miou=number(row.get("miou")),
        fp=number(row.get("fp")),
        fn=number(row.get("fn")),
        precision=number(row.get("precision")),
        recall=number(row.get("recall")),
        iou=_numbers(row, "iou"),
        class_fp=_numbers(row, "class_fp"),
        class_fn=_numbers(row, "class_fn"),
        head=str(row.get("head") or ""),
        scales=tuple(s for s in _numbers(row, "scales") if s is not None),
        flip=row.get("flip") is True,
        crf=str(row.get("crf") or "none"),
        tags=str(row.get("tags") or ""),
        f1=number(row.get("f1")),
    )


def _localised(row: dict[str, Any]) -> Localised:
    return Localised(
        stage=str(row.get("stage", "")),
        split=str(row.get("split", "")),
        images=int(number(row.get("images")) or 0),
        pairs=int(number(row.get("pairs")) or 0),
        unmapped=int(number(row.get("pairs_without_map")) or 0),
        boxes=str(row.get("boxes") or ""),
        rule=str(row.get("rule") or ""),
        conditions=_conditions(row),
        gt_known=number(row.get("gt_known")),
        top1_error=number(row.get("top1_error")),
        top5_error=number(row.get("top5_error")),
        max_box_acc=_numbers(row, "max_box_acc"),
        max_box_acc_v2=number(row.get("max_box_acc_v2")),
    )


def _conditions(row: dict[str, Any]) -> tuple[str, ...]:
    """Under which a number was measured, each in a few words."""
    words = []
    head = row.get("head")
    if head and head != row.get("stage"):
        words.append(head if str(head).startswith("given") else f"head {head}")
    scales = [s for s in _numbers(row, "scales") if s is not None]
    if scales:
        flip = " + flip" if row.get("flip") else ""
        words.append("scales " + ", ".join(f"{s:g}" for s in scales) + flip)
    crf = row.get("crf")
    if crf is not None:
        words.append("no CRF" if crf in (False, "none", "") else f"CRF {crf}".replace(" True", ""))
    if row.get("tags"):
        words.append("no tags used" if row["tags"] == "none" else f"tags {row['tags']}")
    return tuple(words)


def _sweep(values: Any) -> Sweep | None:
    if not isinstance(values, dict):
        return None
    miou, fp, fn = (_curve(values, "thresholds", key) for key in ("miou", "fp", "fn"))
    return Sweep(str(values.get("split", "")), miou, fp, fn) if miou else None


def _uncertain(path: Path) -> list[tuple[str, float]]:
    try:
        return [(row["id"], float(row["score"])) for row in read_csv(path)]
    except (OSError, KeyError, ValueError, csv.Error):
        return []


def _worst(values: Any) -> dict[str, list[tuple[str, float]]]:
    worst: dict[str, list[tuple[str, float]]] = {}
    for stage, pairs in values.items() if isinstance(values, dict) else ():
        for pair in pairs if isinstance(pairs, list) else ():
            if isinstance(pair, list) and len(pair) == 2 and number(pair[1]) is not None:
                worst.setdefault(str(stage), []).append((str(pair[0]), float(pair[1])))
    return worst


def _losses(folder: Path) -> dict[str, Curve]:
    if not (folder / "logs").is_dir():
        return {}
    from weakseg.training.fit import read_losses  # imports Lightning, which takes seconds

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {
            term: [(float(step), value) for step, value in points if math.isfinite(value)]
            for term, points in read_losses(folder).items()
        }
    return {}


def _date(run: RunFolder) -> str:
    """Of the newest record, not of today: the same run gives the same page."""
    files = [run.stage_folder(name) / "stage.json" for name in STAGES]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return f"{datetime.fromtimestamp(max(times), UTC):%d %B %Y, %H:%M} UTC" if times else ""
